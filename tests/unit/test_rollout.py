"""From shadow to the champion's place: every step bound to the evidence, and requests that stay where they are."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tutelage.evolution.evidence import Tally
from tutelage.evolution.promotion import Comparison, Cost, PromotionSettings
from tutelage.evolution.rollout import Rollout, RolloutSettings, step, takes

LADDER, STAGES = PromotionSettings(), RolloutSettings()
AHEAD, EVEN, BEHIND = Tally(60, 20, 20), Tally(40, 20, 40), Tally(20, 20, 60)


def compared(pairs: Tally) -> Comparison:
    return Comparison(pairs, {"sums": pairs}, Cost(100 * pairs.n, pairs.n), Cost(100 * pairs.n, pairs.n))


@pytest.mark.parametrize(
    ("percent", "pairs", "here", "needed", "action", "then"),
    [
        (0, AHEAD, AHEAD, 20, "advance", 1),
        (0, EVEN, EVEN, 20, "stay", 0),
        (0, BEHIND, BEHIND, 20, "stop", 0),
        (1, AHEAD, Tally(19), 20, "stay", 1),
        (1, AHEAD, Tally(20), 20, "advance", 10),
        (10, AHEAD, Tally(20), 20, "advance", 50),
        (50, AHEAD, Tally(20), 20, "promote", 100),
        (50, AHEAD, Tally(20), 1e6, "stay", 50),  # the year's false promotions ask for more than one student's E of 20
        (10, AHEAD, Tally(0, 0, 12), 20, "stop", 0),  # convincing in shadow, worse where it counts
    ],
)
def test_each_step_needs_evidence_that_stands(percent: int, pairs: Tally, here: Tally, needed: float, action: str, then: int) -> None:
    taken = step(Rollout(percent, compared(pairs), here), STAGES, LADDER, needed=needed)

    assert (taken.action, taken.percent) == (action, then)
    assert taken.reason


def test_evidence_that_fades_holds_a_rollout_where_it_is() -> None:
    faded = AHEAD + Tally(0, 0, 30)

    assert step(Rollout(1, compared(faded), Tally(5, 5, 5)), STAGES, LADDER, needed=20).action == "stay"


@given(st.binary(min_size=1, max_size=32), st.floats(0, 100), st.floats(0, 100))
def test_a_growing_share_only_adds_requests(prompt: bytes, one: float, other: float) -> None:
    low, high = sorted((one, other))

    assert takes("sums.v2", prompt, high) or not takes("sums.v2", prompt, low)
    assert takes("sums.v2", prompt, 100)
    assert not takes("sums.v2", prompt, 0)


def test_the_share_is_what_it_says_and_versions_draw_apart() -> None:
    prompts = [hashlib.sha256(str(number).encode()).digest() for number in range(20_000)]
    second = {p for p in prompts if takes("sums.v2", p, 10)}
    third = {p for p in prompts if takes("sums.v3", p, 10)}

    assert 0.09 < len(second) / len(prompts) < 0.11
    assert len(second & third) < 0.2 * len(second)


@pytest.mark.parametrize("stages", [(1, 10, 100), (0, 10, 50), (0, 50, 10, 100), (0, 0, 100)])
def test_stages_rise_from_shadow_to_all(stages: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="must rise"):
        RolloutSettings(stages=stages)
