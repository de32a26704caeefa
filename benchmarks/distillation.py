"""What distillation is worth, one experiment a command: `python -m benchmarks.distillation headlines|shallow|rationale --help`.

Every figure comes with its n, a Wilson interval and what a plain method reaches on the same items. It refuses to tune anything on
what it judges.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks import reasoning
from inference import base
from training import encoding, examples, finetune, losses, recipe, settings
from training.evaluate import EvaluateSettings, answer, evaluate
from training.examples import Example
from training.merge import GATE, merge
from training.prune import prune
from training.recipe import FinetuneSettings
from tutelage.scoring import final, majority, matches, wilson
from tutelage.settings import Home
from tutelage.stores.datasets import read_curve
from tutelage.verifiers import VerifierSettings, verifier

VALIDATION_SHARE = 0.05
ARMS = ("labels", "answers", "probabilities")  # that a shallow student learns from


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__)
    parser.add_argument("--base", type=Path, help="base model folder (default: the packaged one, under TUTELAGE_HOME)")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, students and result.json")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own choice)")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("headlines", help="80 %% of a labelled file to train by a preset, the other 20 %% to judge")
    one.add_argument("--data", type=Path, required=True, help="JSONL of {prompt, label}")
    one.add_argument("--preset", choices=recipe.PRESETS, default="balanced")
    two = commands.add_parser("shallow", help="a layer-pruned student of the parent in --parent: distilled from it, against labels alone")
    two.add_argument("--parent", type=Path, required=True, help="the --work of a `headlines` run")
    two.add_argument(
        "--data", type=Path, required=True, help="JSONL of {prompt, label}; rows that the parent was trained or judged on are left out"
    )
    two.add_argument("--keep", type=int, default=13, help="layers of the student")
    two.add_argument("--traffic", type=int, default=6000, help="rows that the parent answers")
    two.add_argument("--passes", type=int, default=1, help="times that each of those is learned")
    two.add_argument("--labelled", type=int, default=1000, help="rows that have labels, learned as often as takes as many steps")
    two.add_argument("--batch", type=int, default=8, help="rows a step: what was cut wants many steps more than smooth ones")
    two.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    two.add_argument("--temperature", type=float, default=losses.TEMPERATURE, help="of the parent's probabilities")
    two.add_argument("--alpha", type=float, default=0.9, help="of the divergence; the rest is the parent's own answer")
    two.add_argument("--judge", type=int, default=500, help="held-out items")
    two.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    three = commands.add_parser("rationale", help="reasons before the answer against the answer alone, at equal training tokens")
    three.add_argument("--terms", type=int, default=4, help="of each sum")
    three.add_argument("--tokens", type=int, default=30_000, help="computed in training, of each arm")
    three.add_argument("--judge", type=int, default=200, help="held-out items")
    three.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    settings.without_bars()
    arguments.base = arguments.base or base.materialise(Home.from_environment().models)
    arguments.work.mkdir(parents=True, exist_ok=True)
    result = {"headlines": headlines, "shallow": shallow, "rationale": rationale}[arguments.command](arguments)
    (arguments.work / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))


def headlines(options: argparse.Namespace) -> dict[str, Any]:
    """Train by a preset on four fifths; a twentieth of them decides when to stop, the last fifth is only ever judged."""
    rows = examples.read(options.data)
    random.Random(0).shuffle(rows)
    cut = len(rows) * 4 // 5
    held = int(cut * VALIDATION_SHARE)
    parts = {"validation": rows[:held], "train": rows[held:cut], "test": rows[cut:]}
    for name, part in parts.items():
        write(options.work / f"{name}.jsonl", part)
    config = recipe.preset(options.preset).model_copy(update={"threads": options.threads})
    started, cpu = time.perf_counter(), time.process_time()
    manifest = train(options, "train.jsonl", "adapter", config, validation=options.work / "validation.jsonl")
    seconds, core_seconds = time.perf_counter() - started, time.process_time() - cpu
    report = evaluate(options.work / "adapter", options.work / "test.jsonl", base_dir=options.base, config=judging(options))
    seen = {examples.prompt_key(row.prompt) for row in rows[:cut]}
    return {
        "preset": options.preset,
        "seconds": round(seconds),
        "core_seconds": round(core_seconds),
        "trained": manifest["metrics"],
        **{key: report[key] for key in ("n", "correct", "accuracy", "wilson95", "majority", "untrained")},
        "bag_of_words_svm": bag_of_words(rows[:cut], rows[cut:]),
        "test_prompts_also_in_training": sum(examples.prompt_key(row.prompt) in seen for row in rows[cut:]),
    }


def bag_of_words(train_rows: Sequence[Example], judged: Sequence[Example]) -> float:
    """What words alone say: a linear support vector machine on TF-IDF of one and two words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC())
    model.fit([row.text for row in train_rows], [row.label for row in train_rows])
    return float(model.score([row.text for row in judged], [row.label for row in judged]))


def shallow(options: argparse.Namespace) -> dict[str, Any]:
    """The same cut of a finetuned parent, trained for as many steps: on labels, on its parent's answers, on its probabilities of those.

    A parent answers whatever is asked, so its child learns from more prompts than have labels. All rows are new to the parent: of those
    it was trained on its probabilities say what the labels say. Students are trained in full: low-rank weights do not heal such a cut.
    The parent is merged with its adapter before it is timed: unmerged it is several times slower.
    """
    adapter, cut, parent = options.parent / "adapter", options.work / "base", options.work / "parent"
    prune(options.base, cut, keep=options.keep, adapter=adapter)
    judged = examples.read(options.parent / "test.jsonl")[: options.judge]
    if not (parent / GATE).exists():
        merge(adapter, parent, data=write(options.work / "judged.jsonl", judged), base_dir=options.base)
    validation = write(options.work / "validation.jsonl", examples.read(options.parent / "validation.jsonl"))
    asked = random.Random(0).sample(unknown_to_parent(options), options.traffic)
    taught = answered_by(options, parent, asked)
    gold = {row.text: row.label for row in asked}
    rows = {"answers": taught, "probabilities": taught}
    runs = []
    for seed in options.seeds:
        rows["labels"] = random.Random(seed).sample(asked, options.labelled)
        for arm in options.arms:
            data, out = write(options.work / f"{arm}-{seed}.jsonl", rows[arm]), f"{arm}-{seed}"
            config = recipe.preset("balanced").model_copy(
                update={
                    "seed": seed,
                    "strategy": "soft-targets" if arm == "probabilities" else "response",
                    "method": "full",
                    "learning_rate": 3e-4,
                    "step_examples": options.batch,
                    "max_epochs": options.passes * (options.traffic // options.labelled if arm == "labels" else 1),
                    "patience": 0,
                    "probe_tokens": 0,  # what was cut knows nothing for a while
                    "distill_temperature": options.temperature,
                    "distill_alpha": options.alpha,
                    "validations": 6,
                    "threads": options.threads,
                }
            )
            teacher = (parent, None) if arm == "probabilities" else None
            manifest = train(options, data.name, out, config, validation=validation, base_dir=cut, teacher=teacher)
            found = generation(options, options.work / out, None, judged)
            runs.append({"arm": arm, "seed": seed, **found, "steps": manifest["metrics"]["steps"], "curve": curve(options.work / out)})
            print(f"shallow: {arm} seed {seed}: {found['accuracy']:.3f} after {runs[-1]['steps']} steps", flush=True)
    return {
        "layers": options.keep,
        "parent": generation(options, parent, None, judged),
        "parent_right_of_its_traffic": sum(matches(row.label, gold[row.text]) for row in taught) / len(asked),
        "arms": arms(runs),
        "majority": majority([row.label for row in judged]).rate,
        "runs": runs,
    }


def unknown_to_parent(options: argparse.Namespace) -> list[Example]:
    """The rows of the data that the parent was neither trained nor judged on."""
    parts = ("train", "validation", "test")
    seen = {examples.prompt_key(row.prompt) for part in parts for row in examples.read(options.parent / f"{part}.jsonl")}
    return [row for row in examples.read(options.data) if examples.prompt_key(row.prompt) not in seen]


def answered_by(options: argparse.Namespace, parent: Path, rows: Sequence[Example]) -> list[Example]:
    """The rows with what the parent answers in the place of their labels, but for those it is silent about; asked once a folder."""
    from inference.generation import Engine

    file = options.work / f"answered-{len(rows)}.jsonl"
    if not file.exists():
        told = answer(
            Engine(parent, threads=options.threads), rows, student=None, max_tokens=16, batch=64, verify=verifier(VerifierSettings())
        )
        said = [(row, one.completion.text) for row, one in zip(rows, told, strict=True)]
        write(file, [replace(row, label=text, answer=text) for row, text in said if text.strip()])
    return examples.read(file)


def rationale(options: argparse.Namespace) -> dict[str, Any]:
    """Sums whose reasons a program writes: the student either answers at once, or writes the running sums first."""
    judged = reasoning.chain_sums(options.judge, terms=options.terms, seed=10_000)
    known = {row.text for row in judged}
    tokenizer = base.load_tokenizer(options.base)
    config = recipe.preset("fast").model_copy(update={"step_examples": 8, "probe_tokens": 0, "threads": options.threads})
    runs = []
    for seed in range(options.seeds):
        rows = [row for row in reasoning.chain_sums(options.tokens // 20, terms=options.terms, seed=seed) if row.text not in known]
        for arm in ("direct", "reasoned"):
            shown = [reasoning.with_reasons(row) for row in rows] if arm == "reasoned" else rows
            shown = affordable(shown, options.tokens, tokenizer, config)
            data = write(options.work / f"{arm}-{seed}.jsonl", shown)
            seeded = config.model_copy(update={"seed": seed})
            manifest = train(options, data.name, f"{arm}-{seed}-adapter", seeded)
            result = generation(options, options.base, options.work / f"{arm}-{seed}-adapter", judged)
            runs.append({"arm": arm, "seed": seed, "trained_tokens": manifest["metrics"]["tokens"], **result})
            print(f"rationale: {arm} seed {seed}: {result['accuracy']:.3f} after {runs[-1]['trained_tokens']} tokens")
    return {"terms": options.terms, "arms": arms(runs), "majority": majority([row.label for row in judged]).rate, "runs": runs}


def affordable(rows: Sequence[Example], tokens: int, tokenizer: Any, config: FinetuneSettings) -> list[Example]:
    """As many of the rows as have this many tokens together, each to be seen once."""
    spent = list(accumulate(len(sample) for sample in encoding.encode(rows, tokenizer, config)))
    return list(rows[: sum(total <= tokens for total in spent)])


def train(
    options: argparse.Namespace,
    data: str,
    out: str,
    config: FinetuneSettings,
    *,
    validation: Path | None = None,
    base_dir: Path | None = None,
    teacher: tuple[Path, Path | None] | None = None,
) -> dict[str, Any]:
    return finetune.finetune(
        options.work / data,
        options.work / out,
        validation=validation,
        base_dir=base_dir or options.base,
        config=config,
        curve=options.work / f"{out}.curve.csv",
        teacher=teacher,
    )


def generation(options: argparse.Namespace, base_dir: Path, adapter: Path | None, judged: Sequence[Example]) -> dict[str, Any]:
    """Accuracy of generated answers, and what they cost: a student that reasons answers at its end."""
    from inference import adapters
    from inference.generation import Engine

    engine = Engine(base_dir, threads=options.threads)
    if adapter:
        engine.load_adapter("student", adapter, adapters.digest(adapter))
    cpu = time.process_time()
    verify = verifier(VerifierSettings())  # of the whole text; what counts is the final answer, below
    answered = answer(engine, judged, student="student" if adapter else None, max_tokens=96, batch=16, verify=verify)
    spent = time.process_time() - cpu
    right = sum(matches(final(each.completion.text), each.example.label) for each in answered)
    tokens = sum(each.completion.completion_tokens for each in answered)
    share = wilson(right, len(judged))
    return {
        "accuracy": share.rate,
        "wilson95": [share.lo, share.hi],
        "n": share.n,
        "tokens_an_answer": tokens / len(judged),
        "core_seconds_an_answer": spent / len(judged),
        "tokens_per_core_second": tokens / spent,
    }


def arms(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each arm over its seeds: right of all, the interval of the pooled items, the mean and the range of seeds, the cost of an answer."""
    found = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        of = [run for run in runs if run["arm"] == arm]
        pooled = wilson(round(sum(run["accuracy"] * run["n"] for run in of)), sum(run["n"] for run in of))
        seeds = [run["accuracy"] for run in of]
        found[arm] = {"accuracy": pooled.rate, "wilson95": [pooled.lo, pooled.hi], "n": pooled.n, "seeds": seeds}
        for key in ("tokens_an_answer", "core_seconds_an_answer", "tokens_per_core_second"):
            found[arm][key] = sum(run[key] for run in of) / len(of)
    return found


def curve(out: Path) -> list[tuple[int, float]]:
    """Validation accuracy by step."""
    rows = read_curve(out.with_name(f"{out.name}.curve.csv"))
    return [(int(row["step"]), row["val_accuracy"]) for row in rows if "val_accuracy" in row]


def judging(options: argparse.Namespace) -> EvaluateSettings:
    return EvaluateSettings(threads=options.threads, untrained_items=100)


def write(file: Path, rows: Sequence[Example]) -> Path:
    file.write_text("".join(json.dumps(row.row(), ensure_ascii=False) + "\n" for row in rows))
    return file


if __name__ == "__main__":
    main()
