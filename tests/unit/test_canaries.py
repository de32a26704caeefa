"""Canaries: kept from training, rotated, and an alarm that a student trained on them cannot get round."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.evolution.canaries import Canary, blocked, inflated, rotate
from tutelage.evolution.evidence import Tally

RNG = np.random.default_rng(0)


def unit(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=16)
    return vector / np.linalg.norm(vector)


def canaries(first: int, count: int, quarter: int = 0) -> list[Canary]:
    return [Canary(bytes([number]), unit(number), quarter) for number in range(first, first + count)]


def test_a_student_that_learned_the_canaries_by_heart_trips_the_alarm() -> None:
    suspicion = inflated(Tally(110), Tally(26, 0, 14))

    assert suspicion.alarm
    assert "110 of 110" in suspicion.reason
    assert "26 of 40" in suspicion.reason


@pytest.mark.parametrize("ability", [0.3, 0.6, 0.9])
def test_an_honest_student_hardly_ever_does(ability: float) -> None:
    drawn = [(int(RNG.binomial(110, ability)), int(RNG.binomial(40, ability))) for _ in range(300)]
    alarms = [inflated(Tally(exposed, 0, 110 - exposed), Tally(fresh, 0, 40 - fresh)).alarm for exposed, fresh in drawn]

    assert sum(alarms) <= 3


def test_nothing_fresh_to_compare_with_is_no_suspicion() -> None:
    assert not inflated(Tally(110), Tally()).alarm


def test_a_full_set_gives_a_fifth_of_its_oldest_away_once_a_quarter() -> None:
    held = canaries(0, 5, quarter=8) + canaries(5, 5, quarter=9)
    after = rotate(held, canaries(100, 30), size=10, quarter=10)

    assert len(after) == 10
    assert {c.key for c in held} - {c.key for c in after} <= {c.key for c in held if c.quarter == 8}
    assert sum(c.quarter == 10 for c in after) == 2
    assert {c.key for c in rotate(after, canaries(100, 30), size=10, quarter=10)} == {c.key for c in after}


def test_a_set_with_room_is_filled_and_keeps_what_it_holds_when_nothing_new_came() -> None:
    held = canaries(0, 4)

    assert len(rotate(held, canaries(0, 8), size=6, quarter=1)) == 6
    assert {c.key for c in rotate(canaries(0, 6), [], size=6, quarter=5)} == {c.key for c in canaries(0, 6)}


def test_a_canary_and_what_is_almost_it_are_kept_from_training() -> None:
    held = canaries(0, 2)
    paraphrase = unit(1) + 0.05 * unit(7)
    rows = np.stack([unit(0), paraphrase / np.linalg.norm(paraphrase), unit(50)])

    assert blocked([bytes([0]), b"paraphrase", b"other"], rows, held, similar=0.95) == [True, True, False]
    assert blocked([b"other"], rows[2:], [], similar=0.95) == [False]


def test_none_are_kept_where_none_are_wanted() -> None:
    assert rotate([], canaries(0, 5), size=0, quarter=10) == []
    assert rotate(canaries(0, 5, quarter=8), canaries(5, 5), size=0, quarter=10) == []
