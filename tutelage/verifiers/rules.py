"""Verifiers by program: exact, normalised, numeric, JSON by schema, reasoning-gym's own scoring, code by its tests.

A verifier takes an answer, the label and the row's metadata, and says how right it is and why. Only `code` starts a process.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.scoring import matches
from tutelage.settings import VerifierSettings

KINDS = ("exact", "normalised", "numeric", "json_schema", "reasoning_gym", "code")
NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?%?")
FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Verdict:
    """`score` in 0..1; `right`: whether it counts as a success; `reason` says what was compared."""

    score: float
    right: bool
    reason: str


Verifier = Callable[[str, str, Mapping[str, Any]], Verdict]


def verifier(settings: VerifierSettings) -> Verifier:
    """The verifier that `settings` name."""
    if settings.kind == "numeric":
        return lambda answer, label, _: numeric(answer, label, tolerance=settings.tolerance)
    if settings.kind == "code":
        from tutelage.verifiers.code import Limits, run_tests

        limits = Limits(seconds=settings.code_seconds, megabytes=settings.code_megabytes)
        return lambda answer, label, row: run_tests(answer, str(row.get("tests", label)), limits)
    return {"exact": exact, "normalised": normalised, "json_schema": json_schema, "reasoning_gym": reasoning_gym}[settings.kind]


def exact(answer: str, label: str, _: Mapping[str, Any]) -> Verdict:
    """Equal letter by letter."""
    return _verdict(answer == label, "equal" if answer == label else "not equal letter by letter")


def normalised(answer: str, label: str, _: Mapping[str, Any]) -> Verdict:
    """Equal but for case, spacing, quotes and the way a number is written (`scoring.canonical`)."""
    right = matches(answer, label)
    return _verdict(right, "equal after normalising" if right else "different after normalising")


def numeric(answer: str, label: str, *, tolerance: float) -> Verdict:
    """The last number of the answer is the label's, within a relative `tolerance`. Percent signs must agree."""
    wanted, found = _last_number(label), _last_number(answer)
    if wanted is None:
        return _verdict(False, f"the label {label!r:.60} holds no number; verify this task by another kind")
    if found is None:
        return _verdict(False, "no number in the answer")
    right = found[1] == wanted[1] and math.isclose(found[0], wanted[0], rel_tol=tolerance, abs_tol=tolerance)
    return _verdict(right, f"{found[0]:g} against {wanted[0]:g}")


def json_schema(answer: str, label: str, row: Mapping[str, Any]) -> Verdict:
    """Valid JSON under the row's `schema` (JSON Schema) and, where the label is JSON too, equal to it as a value."""
    import jsonschema

    fenced = FENCE.search(answer)
    try:
        value = json.loads(fenced[1] if fenced else answer)
    except ValueError as broken:
        return _verdict(False, f"not JSON: {broken}")
    schema = row.get("schema")
    if schema is not None:
        try:
            jsonschema.validate(value, schema)
        except jsonschema.ValidationError as broken:
            return _verdict(False, f"breaks the schema: {broken.message:.200}")
    try:
        wanted = json.loads(label)
    except ValueError:
        wanted = None
    if wanted is None:
        return _verdict(
            schema is not None, "valid under its schema" if schema is not None else "neither a schema nor a JSON label to hold it to"
        )
    return _verdict(value == wanted, "the same value" if value == wanted else "another value")


def reasoning_gym(answer: str, label: str, row: Mapping[str, Any]) -> Verdict:
    """As the row's reasoning-gym task scores it, from `task` and `entry` in the metadata; without them as `normalised`."""
    if "task" not in row or "entry" not in row:
        return normalised(answer, label, row)
    import sys
    import types

    # one task of the package wants a solver that needs a C compiler to install; no task used here does
    sys.modules.setdefault("pycosat", types.ModuleType("pycosat"))
    import reasoning_gym as gym

    score = float(gym.get_score_answer_fn(row["task"])(answer, row["entry"]))
    return Verdict(score, score >= 1.0, f"{row['task']} gives {score:.2f}")


def _verdict(right: bool, reason: str) -> Verdict:
    return Verdict(float(right), right, reason)


def _last_number(text: str) -> tuple[float, bool] | None:
    """The value, and whether it is in percent."""
    found = [number for number in NUMBER.findall(text) if any(c.isdigit() for c in number)]
    if not found:
        return None
    number = found[-1].replace(",", "").replace("−", "-")
    return float(number.rstrip("%")), number.endswith("%")
