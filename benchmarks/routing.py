"""What is claimed of routing, in one command: `python -m benchmarks.routing --data DIR --out DIR`; figures in FIGURES.md beside it.

Runs the product's own commands on public data that DIR holds and adds the baselines they do not have. It refuses to hide where we
lose: every figure stands beside its target and its baselines, with a paired bootstrap interval where two are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tutelage.evaluations import curves, rows
from tutelage.evaluations.labelled import read_labelled
from tutelage.evaluations.replay import BOOTSTRAPS, embed, splits
from tutelage.evaluations.rows import Log
from tutelage.settings import CHECKOUT, Home

MMLU, GSM8K, NINE = "routing_mmlu", "routing_gsm8k", "routing_multi9"


@dataclass(frozen=True)
class Line:
    """One figure: what was measured on what, ours beside its target and the baselines; `holds` is None where nothing was asked."""

    data: str
    figure: str
    ours: float | None
    target: str
    holds: bool | None
    beside: str


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the data sets; a set that is not there is left out, and said so"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the reports and the table")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), help="these parts alone; the others stay in the table as they were")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "routing.json"
    found: dict[str, list[dict[str, Any]]] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in track([*(arguments.only or PARTS)], description="parts", console=Console(stderr=True), transient=True):
        found[name] = [asdict(line) for line in PARTS[name](arguments.data, arguments.out)]
        kept.write_text(json.dumps(found, indent=1) + "\n")  # part by part: what is cut off loses one
    lines = [Line(**line) for name in PARTS for line in found.get(name, ())]
    (arguments.out / "routing.md").write_text(as_markdown(lines))
    _print(lines)


def mmlu(data: Path, out: Path) -> list[Line]:
    """Fit on one split, route the other; the promise on the same run."""
    fit, log = data / f"{MMLU}_train1531.jsonl", data / f"{MMLU}_dev.jsonl"
    report = run("replay", str(log), "--fit", str(fit), "--report", str(out / "mmlu.json"))
    if isinstance(report, str):
        return [Line("MMLU", "APGR", None, "≥ 0.685", None, report)]
    ours, beside = report["policies"][report["default"]], _two(report) + "; " + _ridges(rows.read_log([log]), rows.read_log([fit]))
    promise = report["policies"]["quality"]["promise"]
    share, above = promise["mean_reference_share"], promise["share_above_promise"]
    against = ours["against"]["best-per-domain"]
    return [
        Line("MMLU", "APGR", ours["apgr"], "≥ 0.685", ours["apgr"] >= 0.685, beside),
        Line("MMLU", "CPT50, %", ours["cpt50"], "≤ 26", ours["cpt50"] <= 26, f"CPT80 {ours['cpt80']:.1f}"),
        Line("MMLU", "APGR above subject prior", against["apgr"], "> 0", None, _interval(against["apgr_interval95"])),
        Line("MMLU", "promise 5 %: resamples above", above, "≤ 0.10", above <= 0.10, f"mean relative loss {promise['mean_loss']:.3f}"),
        Line("MMLU", "promise 5 %: strong share", share, "≤ 0.60", share <= 0.60, "random needs 0.68"),
    ]


def gsm8k(data: Path, out: Path) -> list[Line]:
    """Five-fold cross-fitting on one set."""
    log = data / f"{GSM8K}_dev.jsonl"
    report = run("replay", str(log), "--report", str(out / "gsm8k.json"))
    if isinstance(report, str):
        return [Line("GSM8K", "APGR", None, "≥ 0.63", None, report)]
    ours = report["policies"][report["default"]]
    against = ours["against"]["length"]
    above = against["apgr_interval95"][0] > 0
    return [
        Line("GSM8K", "APGR", ours["apgr"], "≥ 0.63", ours["apgr"] >= 0.63, _two(report) + "; " + _ridges(rows.read_log([log]), None)),
        Line("GSM8K", "APGR above length", against["apgr"], "interval above 0", above, _interval(against["apgr_interval95"])),
    ]


def nine_models(data: Path, out: Path) -> list[Line]:
    """Five-fold cross-fitting over nine models without prices."""
    report = run("replay", str(data / f"{NINE}_train.jsonl"), "--report", str(out / "nine.json"))
    if isinstance(report, str):
        return [Line("nine models", "mean score", None, "best per domain + 0.01", None, report)]
    ours, baselines = report["policies"][report["default"]], report["baselines"]
    against = ours["against"]["best-per-domain"]
    holds = against["mean_quality"] >= 0.01 and against["interval95"][0] > 0
    names = ("best-single", "best-per-domain", "length", "random", "oracle")
    beside = ", ".join(f"{name} {baselines[name]['mean_quality']:.4f}" for name in names)
    return [
        Line("nine models", "mean score", ours["mean_quality"], "–", None, beside),
        Line("nine models", "above best per domain", against["mean_quality"], "≥ 0.01", holds, _interval(against["interval95"])),
    ]


def clinc(data: Path, out: Path) -> list[Line]:
    """Domains with labels, out of scope, and without labels."""
    fit, judged, oos = (data / f"clinc150_{name}.jsonl" for name in ("train", "val", "oos_val"))
    asked = ("--fit", str(fit), "--data", str(judged), "--oos", str(oos))
    report = run("domain-eval", *asked, "--report", str(out / "clinc.json"))
    if isinstance(report, str):
        return [Line("CLINC150", "accuracy", None, "≥ 0.97", None, report)]
    beside = f"{_svm(fit, judged)}, majority {report['majority']:.2f}, interval {_interval(report['wilson95'])}"
    asked_for = (
        ("accuracy", 0.97, beside),
        ("oos_auroc", 0.94, f"{report.get('n_oos')} rows"),
        ("oos_recall_at_5pct", 0.68, f"at the learned threshold {report['oos_recall_at_learned_threshold']:.3f}"),
        ("nmi_unlabelled", 0.6, f"{len(report['found_domains'])} domains found"),
    )
    return [Line("CLINC150", name, report[name], f"≥ {least}", report[name] >= least, note) for name, least, note in asked_for]


def paraphrases(data: Path, out: Path) -> list[Line]:
    """The semantic cache's verifier on pairs: untaught, and taught by a random half of them, five times."""
    file = data / "cache_qqp_dev.jsonl"
    report = run("cache-eval", "--pairs", str(file), "--halves", "5", "--report", str(out / "qqp.json"))
    if isinstance(report, str):
        return [Line("QQP", "average precision", None, "≥ 0.88", None, report)]
    plain, mean, std = report["minilm_cosine"], report["halves"]["mean"], report["halves"]["std"]
    lines = []
    for name, told, asked in (("ap", "average precision", 0.88), ("recall_at_p90", "recall at precision 0.90", 0.45)):
        beside = f"±{std[name]:.3f} between halves; MiniLM cosine {mean[f'minilm_{name}']:.3f}"
        lines.append(Line("QQP, half taught", told, mean[name], f"≥ {asked}", mean[name] >= asked, beside))
        lines.append(Line("QQP, untaught", told, report[name], "≥ MiniLM", report[name] >= plain[name], f"MiniLM cosine {plain[name]:.3f}"))
    false, cosine = report["false_hit_rate"], plain["false_hit_rate"]
    served = f"{_interval(report['false_hit_wilson95'])} of {report['hits']} hits; MiniLM at cosine {plain['threshold']}: {cosine:.3f}"
    return [*lines, Line("QQP, untaught", f"false hits at {report['threshold']}", false, "–", None, served)]


def stored(data: Path, out: Path) -> list[Line]:
    """The semantic cache on GPTCache's own mock data, at the share correct that GPTCache reaches there."""
    report = run("cache-eval", "--pairs", str(data / "cache_gptcache_mock.jsonl"), "--report", str(out / "gptcache_mock.json"))
    if isinstance(report, str):
        return [Line("GPTCache mock", "wrong", None, "≤ 45", None, report)]
    found = report["at_least_correct"]
    ours, plain = found["verified"], found["minilm_cosine"]
    if ours is None:
        return [Line("GPTCache mock", "wrong", None, "≤ 45", False, f"never {found['correct']} correct")]
    beside = f"{ours['correct']} correct, {ours['miss']} missed; GPTCache 77 wrong, MiniLM cosine {plain['wrong'] if plain else '–'}"
    return [Line("GPTCache mock", f"wrong at ≥ {found['correct']} correct", ours["wrong"], "≤ 45", ours["wrong"] <= 45, beside)]


PARTS: dict[str, Callable[[Path, Path], list[Line]]] = {
    "mmlu": mmlu,
    "gsm8k": gsm8k,
    "nine": nine_models,
    "clinc": clinc,
    "paraphrases": paraphrases,
    "stored": stored,
}


def run(command: str, *arguments: str) -> dict[str, Any] | str:
    """The report of one of our commands, or why there is none."""
    done = subprocess.run(
        [sys.executable, "-m", "tutelage.cli", command, *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return f"not run: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f'exit status {done.returncode}'}"
    return dict(json.loads(Path(arguments[arguments.index("--report") + 1]).read_text()))


def _two(report: dict[str, Any]) -> str:
    """APGR of the baselines that rank two models."""
    found = {name: baseline["apgr"] for name, baseline in report["baselines"].items() if "apgr" in baseline and name != "oracle"}
    return ", ".join(f"{name.replace('best-per-domain', 'subject prior')} {apgr:.3f}" for name, apgr in found.items())


def _ridges(log: Log, fit_log: Log | None) -> str:
    """APGR of ridge regressions of the gain on TF-IDF (with the subject as a word) and on MiniLM alone."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    found = []
    for name, model, view in (
        ("TF-IDF ridge", make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), Ridge(3.0)), _with_subject),
        ("MiniLM ridge", Ridge(3.0), _embedded),
    ):
        source = fit_log or log
        inputs, asked = view(source), view(log)
        need = np.zeros(len(log))
        for learned, judged in splits(log, fit_log):
            model.fit(_take(inputs, learned), _gain(source)[learned])
            need[judged] = model.predict(_take(asked, judged))
        weak, strong = _columns(log)
        ranking = curves.rank(need, weak, strong, seed=0)
        random = np.random.default_rng(0)
        draws = (np.bincount(random.integers(0, len(need), len(need)), minlength=len(need)) for _ in range(BOOTSTRAPS))
        interval = curves.intervals(np.array([curves.figures(*curves.sweep(ranking, counts)).apgr for counts in draws]))
        found.append(f"{name} {curves.figures(*curves.sweep(ranking)).apgr:.3f} {_interval(interval)}")
    return ", ".join(found)


def _columns(log: Log) -> tuple[np.ndarray, np.ndarray]:
    return log.scores[:, log.models.index("weak")], log.scores[:, log.models.index("strong")]


def _gain(log: Log) -> np.ndarray:
    weak, strong = _columns(log)
    gain: np.ndarray = strong - weak
    return gain


def _with_subject(log: Log) -> list[str]:
    return [f"subject{(domain or '').replace('_', '')} {prompt}" for domain, prompt in zip(log.domains, log.prompts, strict=True)]


def _embedded(log: Log) -> np.ndarray:
    from tutelage.routing.encoder import Encoder

    encoder = Encoder(Home.from_environment(None).models / "encoder")
    return embed(log.prompts, encoder, lambda doing, done, total: None, "encoding")


def _take(inputs: Any, which: np.ndarray) -> Any:
    return inputs[which] if isinstance(inputs, np.ndarray) else [inputs[i] for i in which]


def _svm(fit: Path, judged: Path) -> str:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    learned, asked = read_labelled(fit), read_labelled(judged)
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), LinearSVC()).fit(learned.prompts, learned.domains)
    return f"TF-IDF SVM {model.score(asked.prompts, asked.domains):.4f}"


def _interval(bounds: list[float]) -> str:
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def as_markdown(lines: list[Line]) -> str:
    """The table as it stands in README.md."""
    header = "| data | figure | ours | target | holds | beside |\n|---|---|---|---|---|---|\n"
    return header + "".join(f"| {' | '.join(_cells(line))} |\n" for line in lines)


def _cells(line: Line) -> list[str]:
    holds = {True: "yes", False: "no", None: "–"}[line.holds]
    return [line.data, line.figure, "–" if line.ours is None else f"{line.ours:.4g}", line.target, holds, line.beside]


def _print(lines: list[Line]) -> None:
    table = Table("data", "figure", "ours", "target", "holds", "beside")
    for line in lines:
        table.add_row(*_cells(line))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
