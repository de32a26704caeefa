"""Curate: recorded interactions in, four frozen splits out, with the count of rows at every step.

A prompt's split depends on nothing but the prompt, so what is held out once is held out in every later cycle. This stage
knows files and text; it refuses to know models and tokens. Same rows and settings, same bytes, in whatever order they come.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from training import examples, settings
from training.examples import Example
from tutelage.errors import TrafficUnreadable
from tutelage.scoring import majority, matches
from tutelage.settings import Strict

# Upper bounds in hundredths of all prompts. In the code and not in the settings: moving a bound would move prompts that
# were held out into training, and held-out accuracy would mean nothing from then on.
SPLITS = (("train", 66), ("validation", 71), ("calibration", 86), ("test", 100))

CONTROL_TOKEN = re.compile(r"<\|[\w ]{1,40}\|>")
SECRETS = re.compile(
    r"\bsk-[A-Za-z0-9_-]{20,}|\btut_[a-z]+_\w+_\w{16,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


class CurateSettings(Strict):
    """Most rows to keep of each split; fewest rows without which training or judging would be pointless."""

    max_train: int = Field(default=4000, ge=1)
    max_validation: int = Field(default=32, ge=1)
    max_calibration: int = Field(default=120, ge=1)
    max_test: int = Field(default=110, ge=1)
    min_train: int = Field(default=20, ge=1)
    min_test: int = Field(default=5, ge=1)
    max_characters: int = Field(default=8000, ge=1)


@dataclass(frozen=True)
class Row:
    """An example and its prompt's key."""

    key: str
    example: Example


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.curate", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="interactions.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for the four splits and report.json")
    parser.add_argument("--config", type=Path, help="YAML with CurateSettings")
    arguments = parser.parse_args()
    report = curate(arguments.data, arguments.out, config=settings.read(CurateSettings, arguments.config))
    kept = ", ".join(f"{name} {count}" for name, count in report["splits"].items())
    print(f"curate: {report['rows']} rows in; {kept}; report in {arguments.out / 'report.json'}")


def curate(data: Path, out: Path, *, config: CurateSettings) -> dict[str, Any]:
    """Read, clean, split and write; returns the report that is also written to `out/report.json`.

    Raises:
        TrafficUnreadable: the file cannot be read, or too few rows are left to train and judge on.
    """
    rows, unreadable = read_rows(data)
    report: dict[str, Any] = {"rows": len(rows) + len(unreadable), "unreadable": unreadable}
    rows = _without(rows, _unsafe, report, "unsafe")
    rows = _without(rows, lambda row: len(row.example.text) > config.max_characters, report, "too_long")
    rows = _without(rows, _unjudgeable, report, "no_reference")
    rows = _deduplicate(rows, report)
    splits = {name: [row for row in rows if split_of(row.key) == name] for name, _ in SPLITS}
    for name in ("train", "validation"):
        splits[name] = _without(splits[name], _teacher_wrong, report, f"teacher_wrong_{name}")
    splits = {name: kept[: getattr(config, f"max_{name}")] for name, kept in splits.items()}
    splits["train"] = _without(splits["train"], _held_out(splits), report, "leaked")
    report["splits"] = {name: len(kept) for name, kept in splits.items()}
    report["majority"] = majority([row.example.label for row in splits["train"]]).rate
    _refuse_too_few(report, config, data)
    _write(splits, report, out)
    return report


def split_of(key: str) -> str:
    """The split that a prompt belongs to, now and in every later cycle."""
    hundredth = int(key[:16], 16) % 100
    return next(name for name, bound in SPLITS if hundredth < bound)


def read_rows(data: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """Readable rows, and for each unreadable line its number and what was expected there."""
    rows, unreadable = [], []
    for number, line in examples.lines(data):
        try:
            example = examples.parse(line)
        except TrafficUnreadable as broken:
            unreadable.append({"line": number, "problem": broken.message})
        else:
            rows.append(Row(examples.prompt_key(example.prompt), example))
    return rows, unreadable


def _without(rows: Sequence[Row], unwanted: Callable[[Row], bool], report: dict[str, Any], reason: str) -> list[Row]:
    kept = [row for row in rows if not unwanted(row)]
    report[reason] = len(rows) - len(kept)
    return kept


def _unsafe(row: Row) -> bool:
    """Control tokens would teach the student to open turns; a secret would end up in its weights."""
    text = "\n".join([*(m["content"] for m in row.example.prompt), row.example.answer])
    return bool(CONTROL_TOKEN.search(text) or SECRETS.search(text))


def _teacher_wrong(row: Row) -> bool:
    return row.example.metadata.get("verdict") == 0 or not matches(row.example.answer, row.example.label)


def _unjudgeable(row: Row) -> bool:
    """The teacher was wrong and nobody said what is right: good for neither training nor judging."""
    judged_by_teacher = matches(row.example.answer, row.example.label)
    return row.example.metadata.get("verdict") == 0 and judged_by_teacher


def _deduplicate(rows: Sequence[Row], report: dict[str, Any]) -> list[Row]:
    """One row a prompt, in the order of keys: a right one before a wrong one, then by content, so input order is no matter."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row.key, _teacher_wrong(row), json.dumps(row.example.row(), sort_keys=True))):
        best.setdefault(row.key, row)
    report["duplicates"] = len(rows) - len(best)
    return list(best.values())


def _held_out(splits: dict[str, list[Row]]) -> Callable[[Row], bool]:
    """Belt and braces: splitting by key already keeps held-out prompts out; a fault there must not pass unseen."""
    keys = {row.key for name, kept in splits.items() if name != "train" for row in kept}
    return lambda row: row.key in keys


def _refuse_too_few(report: dict[str, Any], config: CurateSettings, data: Path) -> None:
    for name, least in (("train", config.min_train), ("test", config.min_test), ("validation", 1)):
        if report["splits"][name] < least:
            raise TrafficUnreadable(
                f"{data}: of {report['rows']} rows {report['splits'][name]} are left in {name}, at least {least} are needed "
                f"({len(report['unreadable'])} unreadable, {report['duplicates']} duplicates, {report['teacher_wrong_train']} wrong); "
                "record more traffic, then run curate again"
            )


def _write(splits: dict[str, list[Row]], report: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    total = hashlib.sha256()
    for name, kept in splits.items():
        text = _jsonl(kept)
        total.update(text.encode())
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    report["digest"] = total.hexdigest()
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _jsonl(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row.example.row(), sort_keys=True, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
