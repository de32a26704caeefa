"""What is on record of a request, as a demo's report counts it."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.demo.client import Sent
from tutelage.demo.observed import answered
from tutelage.demo.traffic import Item
from tutelage.records import Attempt, Tier

SENT = Sent(Item("2 + 2", "4", "sums"), "4", {"x-request-id": "r", "x-tutelage-cost-usd": "0.0000084"}, 0.25)


def row(tier: Tier, *attempts: Attempt, cache: str = "miss") -> dict[str, dict[str, Any]]:
    return {"r": {"tier": tier, "attempts": list(attempts), "cache": cache, "cost_microusd": 8}}


def attempt(tier: Tier, *, accepted: bool) -> Attempt:
    return Attempt("acme-sums", tier, "d", "4", 2.0, 0.9, accepted, "", 8)


@pytest.mark.parametrize(
    ("tier", "tries", "counted", "by_student"),
    [
        ("student", (attempt("student", accepted=True),), "student", True),
        ("teacher", (attempt("teacher", accepted=True),), "ta", True),  # a student that rose to that tier
        ("teacher", (attempt("ta", accepted=False),), "teacher", False),
        ("teacher", (), "teacher", False),
    ],
)
def test_an_answer_is_a_students_whatever_tier_it_has_reached(
    tier: Tier, tries: tuple[Attempt, ...], counted: str, by_student: bool
) -> None:
    found = answered(SENT, "after", row(tier, *tries))

    assert (found.tier, found.by_student) == (counted, by_student)


def test_cost_and_waiting_are_the_clients_own() -> None:
    found = answered(SENT, "after", row("teacher", cache="hit-exact"))

    assert (found.cost_usd, found.seconds, found.cached, found.correct) == (0.0000084, 0.25, True, True)


def test_a_request_that_nobody_recorded_was_answered_by_nobody() -> None:
    assert answered(SENT, "after", {}).tier is None
