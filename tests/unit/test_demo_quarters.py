"""A day's figures: recomputed by hand, or checked for what must hold of any day."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.demo.outcome import Answered, Trained
from tutelage.demo.quarters import Cycle, Observed, Taught, day, latency, quarter
from tutelage.records import Tier

ALONE = Answered("a", "before", True, 0.01, "teacher", seconds=0.5)


def served(tier: Tier | None = "ta", cost: float = 0.001, *, correct: bool = True, **changes: object) -> Answered:
    return Answered("a", "after", correct, cost, tier, **{"seconds": 0.1, **changes})  # type: ignore[arg-type]


def observed(*answers: Answered, checks_usd: float = 0.0, repeated: int = 0) -> Observed:
    return Observed(answers, (ALONE,) * len(answers), repeated, checks_usd)


def lived(*quarters: Observed, cycles: tuple[Cycle, ...] = ()) -> object:
    return day(quarters, cycles, (), at_once=2, alone_at_once=16, teacher_seconds=0.5, teacher_error_rate=0.05)


ANSWER = st.builds(
    served,
    st.sampled_from([*get_args(Tier), None]),
    st.floats(0, 0.02),
    correct=st.booleans(),
    cached=st.booleans(),
    escalated=st.booleans(),
)


def test_what_was_saved_is_told_by_who_saved_it() -> None:
    found = quarter(
        observed(
            served("ta", 0.001),
            served("teacher", 0.0, cached=True),
            served("teacher", 0.012, escalated=True),
            served("teacher", 0.01),
            checks_usd=0.002,
        )
    ).saved

    assert found.by_students == pytest.approx(0.009 / 0.04)
    assert found.by_cache == pytest.approx(0.01 / 0.04)
    assert found.by_escalations == pytest.approx(-0.002 / 0.04)
    assert found.by_checks == pytest.approx(-0.002 / 0.04)
    assert found.share == pytest.approx(1 - 0.025 / 0.04)


def test_what_nobody_answered_is_wrong_and_saves_nothing() -> None:
    found = quarter(
        observed(served(None, 0.0, correct=False), served(None, 0.0, correct=False), served("ta", 0.0), served("teacher", 0.01))
    )

    assert found.saved.share == pytest.approx(0.25)
    assert found.saved.by_escalations == 0
    assert found.quality.ratio == pytest.approx(0.5)


@given(st.lists(ANSWER, min_size=2, max_size=12), st.floats(0, 0.05))
@settings(max_examples=25)
def test_the_parts_of_a_saving_add_up_to_it(answers: list[Answered], checks_usd: float) -> None:
    found = quarter(observed(*answers, checks_usd=checks_usd)).saved

    assert found.share == pytest.approx(found.by_students + found.by_cache + found.by_escalations + found.by_checks)


def test_quality_is_the_share_right_over_the_teachers_on_the_same_requests() -> None:
    answers = tuple(served(correct=n < 8) for n in range(10))
    alone = tuple(Answered("a", "before", n < 9, 0.01, "teacher") for n in range(10))

    found = quarter(Observed(answers, alone, 0))

    assert found.quality.ratio == pytest.approx(8 / 9)
    assert found.by_students_right == 0.8


def test_waiting_is_told_by_who_answered_and_beside_the_teacher_alone() -> None:
    found = quarter(
        observed(served(seconds=0.2), served("teacher", cached=True, seconds=0.004), served("teacher", escalated=True, seconds=0.7))
    )

    assert {who: waiting.n for who, waiting in found.latency.items()} == {
        "all": 3, "cache": 1, "students": 1, "escalated": 1, "teacher": 0, "always-teacher": 3,
    }  # fmt: skip
    assert found.latency["all"].p50_seconds == pytest.approx(0.2)
    assert found.latency["always-teacher"].p50_seconds == pytest.approx(0.5)
    assert latency([]).p50_seconds is None


def test_targets_are_judged_by_the_last_quarter_whichever_way_it_went() -> None:
    dear, cheap = observed(*[served("teacher", 0.01)] * 4), observed(*[served("ta", 0.001)] * 4)

    rising, falling = lived(dear, cheap), lived(cheap, dear)

    assert [target.met for target in rising.targets] == [True, True, True, None]  # type: ignore[attr-defined]
    assert [target.met for target in falling.targets] == [False, True, True, None]  # type: ignore[attr-defined]


def test_the_gain_of_students_leaves_out_those_that_were_refused() -> None:
    made = [Trained("a", "s", "promoted", "", 100, 40, 10, 4, after, 20) for after in (36, 0)]
    taught = tuple(
        Taught(t, n, action, "", datetime(2026, 1, 1, tzinfo=UTC))
        for n, (t, action) in enumerate(zip(made, ["keep", "refuse"], strict=True))
    )

    found = lived(observed(*[served()] * 2), cycles=(Cycle(1, 60.0, {"finetune": 40.0}, taught),))

    assert found.targets[-1].measured == pytest.approx(0.9 - 0.2)  # type: ignore[attr-defined]
    assert [one.after for one in found.cycles[0].versions] == [0.9, 0.0]  # type: ignore[attr-defined]


def test_a_day_of_which_nothing_was_seen_promises_nothing() -> None:
    assert lived().targets == ()  # type: ignore[attr-defined]
    assert quarter(Observed((), (), 0)).saved.share is None
