"""Distill: curated rows in, what a student is given to learn out: words, log-probabilities, reasons, weights, worse answers.

`response` passes the teacher's words on. `soft-targets` adds its log-probabilities, `reasoning` its rationales, `metric-aware` weights by
score and the hardest wrong answer beside the right one; `multi-aspect` adds all of them. A row that lacks something trains on what it
has, and the report says how many and why: no target is ever made up. It refuses to know losses and how training uses each aspect.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from training import examples, settings, targets, teachers
from training.examples import Example
from training.teachers import TeacherSettings, Told, Vocabulary
from tutelage.errors import ConfigInvalid
from tutelage.scoring import matches
from tutelage.settings import Home, Strict
from tutelage.verifiers import VerifierSettings, verifier

REPLIES = "asked.jsonl"


class DistillSettings(Strict):
    """`strategy`: what is added to the teacher's words (`examples.ASPECTS`).

    `dimensions`: how much each score of a row counts in its weight ("verifier" is measured here by `verifier`; the others are in its
    metadata); `min_weight`: the least share of the mean weight that a row can have. `max_preferences`: rows that get a worse answer, the
    hardest first.
    `teacher`: where log-probabilities and rationales that the rows lack come from.
    """

    strategy: Literal["response", "soft-targets", "reasoning", "metric-aware", "multi-aspect"] = "response"
    max_rationale_characters: int = Field(default=2000, ge=1)
    dimensions: Mapping[str, float] = Field(default_factory=lambda: {"verifier": 1.0, "judge": 1.0, "feedback": 1.0})
    min_weight: float = Field(default=0.1, gt=0, le=1)
    max_preferences: int = Field(default=1000, ge=0)
    verifier: VerifierSettings = VerifierSettings()
    teacher: TeacherSettings = TeacherSettings()


@dataclass(frozen=True)
class Negative:
    """A wrong answer: how sure its model was and how much it looks like the right one (0..1 each). What is hard to tell teaches most."""

    answer: str
    confidence: float
    likeness: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.distill", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="curated train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, its manifest and report.json")
    parser.add_argument("--base", type=Path, help="the student's base, for its tokenizer (default: the packaged one, under TUTELAGE_HOME)")
    parser.add_argument("--config", type=Path, help="YAML with DistillSettings")
    arguments = parser.parse_args()
    config = settings.read(DistillSettings, arguments.config)
    report = distill(arguments.data, arguments.out, config=config, base_dir=arguments.base)
    told = ", ".join(f"{count} with {name}" for name, count in report["carried"].items()) or "their words alone"
    print(f"distill: {config.strategy}: {report['rows']} rows, {told}; report in {arguments.out / 'report.json'}")


def distill(data: Path, out: Path, *, config: DistillSettings, base_dir: Path | None = None) -> dict[str, Any]:
    """Write `out/train.jsonl`, beside it its manifest, and `out/report.json`, which is returned.

    Raises:
        TrafficUnreadable: a row of `data` cannot be read.
        ConfigInvalid: the strategy needs what no teacher gives, or stored targets are of another tokenizer.
        EngineFailed: the teacher's endpoint answers nothing.
    """
    rows = examples.read(data)
    wanted = examples.ASPECTS[config.strategy]
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = _vocabulary(base_dir) if "targets" in wanted and config.teacher.source != "none" else None
    told = _told(rows, config, vocabulary, kept=out / REPLIES)
    weights = weigh(rows, config) if "weight" in wanted else [1.0] * len(rows)
    rejected = reject(rows, config.max_preferences) if "rejected" in wanted else [None] * len(rows)
    lines = [_row(*parts, config=config) for parts in zip(rows, told, weights, rejected, strict=True)]
    if config.strategy == "soft-targets" and not any("targets" in line for line in lines):
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(t.why_not for t in told).items())
        raise ConfigInvalid(
            f"no row has a teacher's log-probabilities ({why}); name a teacher that gives them, or use the strategy response"
        )
    text = "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines)
    (out / "train.jsonl").write_text(text, encoding="utf-8")
    report = _report(lines, told, weights, config)
    manifest = {
        "strategy": config.strategy,
        "teacher": config.teacher.model or config.teacher.file,
        "tokenizer_hash": vocabulary.hash if vocabulary else None,
        "template_hash": vocabulary.template_hash if vocabulary else None,
        "data_digest": hashlib.sha256(data.read_bytes()).hexdigest(),
        "digest": hashlib.sha256(text.encode()).hexdigest(),
    }
    (out / "train.jsonl.manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def weigh(rows: Sequence[Example], config: DistillSettings) -> list[float]:
    """A weight for each row, of mean 1: the mean of its known scores by `dimensions`; rows without any weigh as the mean of the others."""
    verify = verifier(config.verifier)
    scores = []
    for row in rows:
        known = {**(row.metadata.get("scores") or {}), "verifier": verify(row.answer, row.label, row.metadata).score}
        counted = {name: weight for name, weight in config.dimensions.items() if weight > 0 and known.get(name) is not None}
        total = sum(counted.values())
        scores.append(sum(weight * float(known[name]) for name, weight in counted.items()) / total if total else None)
    told = [score for score in scores if score is not None]
    mean = sum(told) / len(told) if told else 1.0
    if mean <= 0:
        return [1.0] * len(rows)
    bounded = [max(config.min_weight, 1.0 if score is None else score / mean) for score in scores]
    return [round(weight * len(bounded) / sum(bounded), 6) for weight in bounded]


def reject(rows: Sequence[Example], most: int) -> list[str | None]:
    """For each row the hardest wrong answer that some model gave to it; of all rows the `most` hardest."""
    hardest = [max(negatives(row), key=lambda n: (n.confidence, n.likeness, n.answer), default=None) for row in rows]
    ranked = sorted(((-n.confidence, -n.likeness, at) for at, n in enumerate(hardest) if n))
    chosen = {at for _, _, at in ranked[:most]}
    return [negative.answer if negative and at in chosen else None for at, negative in enumerate(hardest)]


def negatives(row: Example) -> list[Negative]:
    """What models answered to this prompt that is known to be wrong: it does not say what the row's answer says."""
    tried = [(str(a.get("answer")), a.get("confidence")) for a in row.metadata.get("attempts") or () if a.get("answer")]
    tried += [(str(answer), None) for answer in row.metadata.get("wrong_answers") or ()]
    return [
        Negative(answer, float(confidence or 0.0), SequenceMatcher(None, answer, row.answer).ratio())
        for answer, confidence in tried
        if answer.strip() and not matches(answer, row.answer) and not matches(answer, row.label)
    ]


def _told(rows: Sequence[Example], config: DistillSettings, vocabulary: Vocabulary | None, *, kept: Path) -> list[Told]:
    """What the rows themselves hold, completed by the teacher."""
    wanted = examples.ASPECTS[config.strategy]
    own = [row.metadata.get("rationale") for row in rows]
    asks = vocabulary is not None or ("rationale" in wanted and not all(own))
    nobody = Told(why_not="no_teacher", why_no_rationale="no_teacher")
    if config.teacher.source == "none" or not asks:
        given = [nobody] * len(rows)
    elif config.teacher.source == "file":
        given = teachers.stored(rows, Path(str(config.teacher.file)), vocabulary)
    else:
        why_not = _other_tokens(config.teacher, vocabulary) if vocabulary else None
        usable = None if why_not else vocabulary
        given = teachers.ask(rows, config.teacher, vocabulary=usable, rationales="rationale" in wanted, kept=kept)
        given = [replace(t, why_not=why_not or t.why_not) for t in given]
    return [t if not mine else replace(t, rationale=str(mine)) for t, mine in zip(given, own, strict=True)]


def _other_tokens(teacher: TeacherSettings, vocabulary: Vocabulary) -> str | None:
    """Why the teacher's token ids are of no use: they are not the student's, or nobody said whose they are. None where they are."""
    if teacher.tokenizer is None:
        return "teacher_tokenizer_not_named"
    from inference import base

    theirs = targets.tokenizer_hash(base.load_tokenizer(Path(teacher.tokenizer)))
    return None if theirs == vocabulary.hash else "other_tokenizer"


def _vocabulary(base_dir: Path | None) -> Vocabulary:
    from inference import base, prompts

    tokenizer = base.load_tokenizer(base_dir or base.materialise(Home.from_environment().models))
    return Vocabulary.of(tokenizer, prompts.template_hash(tokenizer))


def _row(row: Example, told: Told, weight: float, rejected: str | None, *, config: DistillSettings) -> dict[str, Any]:
    """The line to learn from: the example and what the strategy adds to it."""
    wanted = examples.ASPECTS[config.strategy]
    line = row.row()
    if "targets" in wanted and told.targets is not None:
        line["targets"] = told.targets
    if "rationale" in wanted and told.rationale and len(told.rationale) <= config.max_rationale_characters:
        line["rationale"] = told.rationale
    if "weight" in wanted:
        line["weight"] = weight
    if rejected is not None:
        line |= {"chosen": row.answer, "rejected": rejected}
    return line


def _report(lines: Sequence[Mapping[str, Any]], told: Sequence[Told], weights: Sequence[float], config: DistillSettings) -> dict[str, Any]:
    """How many rows carry each aspect the strategy wants, and why the others do not."""
    wanted = sorted(examples.ASPECTS[config.strategy])
    without = [t for t, line in zip(told, lines, strict=True) if "targets" not in line]
    carried = {name: sum(name in line for line in lines) for name in wanted}
    report: dict[str, Any] = {"strategy": config.strategy, "rows": len(lines), "carried": carried}
    if "targets" in wanted:
        report["text_only"] = dict(sorted(Counter(t.why_not or "no_logprobs" for t in without).items()))
    if "rationale" in wanted:
        missing = [t.why_no_rationale or "too_long" for t, line in zip(told, lines, strict=True) if "rationale" not in line]
        report["without_rationale"] = dict(sorted(Counter(missing).items()))
    if "weight" in wanted:
        report["weights"] = {"least": min(weights), "most": max(weights)}
    return report


if __name__ == "__main__":
    main()
