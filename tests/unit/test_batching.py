"""Who runs together: the oldest always, others while padding stays cheap."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inference.batching import ALWAYS_TOGETHER, next_batch


def test_similar_prompts_run_together_up_to_the_limit() -> None:
    assert next_batch([100] * 20, max_rows=16) == list(range(16))


def test_a_long_prompt_does_not_make_short_ones_pay() -> None:
    assert next_batch([100, 4000, 110, 90], max_rows=16) == [0, 2, 3]


def test_a_long_prompt_runs_when_its_turn_comes() -> None:
    assert next_batch([4000, 100, 110], max_rows=16) == [0]


def test_small_prompts_run_together_whatever_their_lengths() -> None:
    assert next_batch([10, 80, 15], max_rows=16) == [0, 1, 2]


def test_nobody_waiting_is_no_batch() -> None:
    assert next_batch([], max_rows=16) == []


@given(st.lists(st.integers(1, 8000), min_size=1, max_size=60), st.integers(1, 32))
def test_the_oldest_always_runs_and_waste_is_bounded(lengths: list[int], max_rows: int) -> None:
    taken = next_batch(lengths, max_rows=max_rows, max_waste=0.5)
    chosen = [lengths[i] for i in taken]
    assert taken[0] == 0
    assert len(taken) <= max_rows
    padded = max(chosen) * len(chosen)
    assert len(chosen) == 1 or padded <= max(ALWAYS_TOGETHER, 1.5 * sum(chosen))
