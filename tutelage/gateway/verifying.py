"""What a program can tell of answers: in domains that routing.yaml names a verifier for, every answer and every try is checked after the
reply against what its request says of a right one, and noted as an outcome.

A request says it in its metadata (`label`; `tests` for code; `task` and `entry`, as JSON, for reasoning-gym; `schema`, as JSON), or by the
schema of its `response_format`. One that says nothing is not checked. It refuses to know how answers are compared (`tutelage.verifiers`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tutelage.gateway.exchange import Asked, Placed
from tutelage.gateway.exchange import Outcome as Given
from tutelage.records import Outcome
from tutelage.settings import RoutingSettings
from tutelage.stores import outcomes
from tutelage.stores.database import Pool
from tutelage.verifiers import Verifier, verifier

TOLD = ("tests", "task", "entry", "schema")
AS_JSON = ("entry", "schema")


@dataclass(frozen=True)
class Case:
    """How the answers to one request are checked."""

    verify: Verifier
    label: str
    row: Mapping[str, Any]

    def worth(self, answer: str) -> float:
        return min(max(self.verify(answer, self.label, self.row).score, 0.0), 1.0)


class Verifying:
    """The verifiers of one worker."""

    def __init__(self, pool: Pool, *, routing: Callable[[], RoutingSettings]) -> None:
        self._pool, self._routing = pool, routing

    def case(self, asked: Asked, placed: Placed) -> Case | None:
        """None where nothing can be told: the domain has no verifier, or the request does not say what is right."""
        settings = self._routing().verifiers.get(placed.domain or "")
        if settings is None:
            return None
        metadata, row = asked.request.metadata, _row(asked)
        return Case(verifier(settings), metadata.get("label", ""), row) if row or "label" in metadata else None

    async def note(self, case: Case, asked: Asked, placed: Placed, given: Given) -> None:
        """Check what was given and what was tried; the request must be recorded."""
        found = [
            (attempt.model, attempt.digest, attempt.score, attempt.confidence, attempt.answer, attempt.accepted)
            for attempt in given.attempts
            if attempt.answer
        ]
        if not any(accepted for *_, accepted in found):
            found.append((given.model, None, None, None, given.answer.text, True))
        noted = []
        for model, digest, score, confidence, answer, served in found:
            value = await asyncio.to_thread(case.worth, answer)  # code is run in a process, which takes its time
            noted.append(
                Outcome(
                    asked.caller.tenant_id, asked.id, model, digest, placed.domain, score, confidence, value, served, "verifier", 1.0
                )
            )  # fmt: skip
        await outcomes.add(self._pool, noted)


def _row(asked: Asked) -> dict[str, Any]:
    """What the request says of a right answer, beside a label; what is not JSON where it should be says nothing."""
    row: dict[str, Any] = {}
    for name in TOLD:
        if (told := asked.request.metadata.get(name)) is not None:
            with suppress(ValueError):
                row[name] = json.loads(told) if name in AS_JSON else told
    shape = asked.request.shape.get("response_format")
    if "schema" not in row and isinstance(shape, dict) and isinstance(shape.get("json_schema"), dict):
        schema = shape["json_schema"].get("schema")
        row |= {"schema": schema} if isinstance(schema, dict) else {}
    return row
