"""Recorded traffic with what each model's answer was worth, read from JSONL; a bad row is refused with its file and line.

Knows the two row forms and nothing of what is done with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np

WEAK, STRONG = "weak", "strong"
FORMS = '{"prompt", "domain"?, "scores": {model: 0..1}, "cost_usd"?: {model: x}} or {"prompt", "domain"?, "weak_correct", "strong_correct"}'


@dataclass(frozen=True, eq=False)
class Log:
    """Answered requests: `scores` float64 [n, models] in 0..1, `costs` likewise in US dollars, None where no price is known."""

    prompts: list[str]
    domains: list[str | None]
    models: tuple[str, ...]
    scores: np.ndarray
    costs: np.ndarray | None

    def __len__(self) -> int:
        return len(self.prompts)


def read_log(paths: Sequence[Path]) -> Log:
    """All rows of the files, in order. Raises InvalidRequest on a missing file, a bad row, or models that differ between rows."""
    import numpy as np

    rows = [(place, row) for path in paths for place, row in read_objects(path)]
    if not rows:
        raise InvalidRequest(f"{', '.join(map(str, paths))}: no rows; rows are {FORMS}")
    place, first = rows[0]
    models = tuple(sorted(_scores(place, first))) if "scores" in first else (WEAK, STRONG)
    priced = first.get("cost_usd") is not None
    scores = [_in_order(place, _scores(place, row), models, "scores") for place, row in rows]
    spent = [_costs(place, row, priced) for place, row in rows]
    costs = [_in_order(place, cost, models, "cost_usd") for (place, _), cost in zip(rows, spent, strict=True)] if priced else None
    return Log(
        [text(place, row, "prompt") for place, row in rows],
        [label(place, row, "domain") for place, row in rows],
        models,
        np.array(scores),
        None if costs is None else np.array(costs),
    )


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object with its place, "file:line"; empty lines are skipped. Raises InvalidRequest."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines also cuts at U+2028, which JSON may hold
    except (OSError, UnicodeDecodeError) as unreadable:
        raise InvalidRequest(f"{path} cannot be read: {unreadable}") from unreadable
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as broken:
            raise InvalidRequest(f"{path}:{number}: not JSON: {broken}; write one object a line") from broken
        if not isinstance(row, dict):
            raise InvalidRequest(f"{path}:{number}: a {type(row).__name__}, not an object; write one object a line")
        yield f"{path}:{number}", row


def text(place: str, row: Mapping[str, Any], name: str) -> str:
    """A text that must be there. Raises InvalidRequest."""
    value = row.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{place}: `{name}` is {json.dumps(value)}; it must be a text")
    return value


def label(place: str, row: Mapping[str, Any], name: str) -> str | None:
    """A text that may be missing or null. Raises InvalidRequest."""
    return None if row.get(name) is None else text(place, row, name)


def _scores(place: str, row: Mapping[str, Any]) -> dict[str, float]:
    if "scores" in row:
        scores = _numbers(place, row["scores"], "scores")
    elif "weak_correct" in row and "strong_correct" in row:
        scores = _numbers(place, {WEAK: row["weak_correct"], STRONG: row["strong_correct"]}, "weak_correct and strong_correct")
    else:
        raise InvalidRequest(f"{place}: neither `scores` nor `weak_correct` and `strong_correct`; rows are {FORMS}")
    for model, score in scores.items():
        if not 0.0 <= score <= 1.0:
            raise InvalidRequest(f"{place}: the score of {model} is {score}; scores are in 0..1")
    return scores


def _costs(place: str, row: Mapping[str, Any], priced: bool) -> dict[str, float]:
    if (row.get("cost_usd") is not None) != priced:
        raise InvalidRequest(f"{place}: `cost_usd` is on some rows and not on others; give it on all or on none")
    costs = _numbers(place, row["cost_usd"], "cost_usd") if priced else {}
    for model, cost in costs.items():
        if cost < 0:
            raise InvalidRequest(f"{place}: the cost of {model} is {cost}; costs are US dollars, zero or more")
    return costs


def _numbers(place: str, value: Any, name: str) -> dict[str, float]:
    if not isinstance(value, dict) or not value:
        raise InvalidRequest(f"{place}: `{name}` is {json.dumps(value)}; it must name a number for each model")
    for model, number in value.items():
        if not isinstance(number, (bool, int, float)) or number != number or number in (float("inf"), float("-inf")):
            raise InvalidRequest(f"{place}: {name} of {model} is {json.dumps(number)}; it must be a number")
    return {model: float(number) for model, number in value.items()}


def _in_order(place: str, values: Mapping[str, float], models: Sequence[str], name: str) -> list[float]:
    if set(values) != set(models):
        raise InvalidRequest(
            f"{place}: `{name}` is of {', '.join(sorted(values))}; every row must be of {', '.join(models)}, as the first is"
        )
    return [values[model] for model in models]
