"""Packing: which tokens are computed, and who may attend to whom."""

from __future__ import annotations

import pytest

from training.packing import WHOLE, Sample, cost, pack, shared_prefix, split

ONE = Sample((1, 2, 3, 4), (7, 9))
TWO = Sample((1, 2, 5), (8, 8, 9))


def test_the_shared_beginning_leaves_each_prompt_its_last_token() -> None:
    assert shared_prefix([ONE, TWO]) == 2
    assert shared_prefix([ONE, ONE]) == 3
    assert shared_prefix([Sample((1,), (9,)), ONE]) == 0


def test_a_pass_computes_the_shared_beginning_once() -> None:
    assert cost([ONE, TWO]) == 2 + 3 + 3
    assert pack([ONE, TWO]).ids[0, :8].tolist() == [1, 2, 3, 4, 7, 5, 8, 8]


def test_positions_continue_from_the_shared_beginning() -> None:
    assert pack([ONE, TWO]).positions[0, :8].tolist() == [0, 1, 2, 3, 4, 2, 3, 4]


@pytest.mark.parametrize("more", range(WHOLE))
def test_a_pass_is_filled_up_with_a_row_that_nobody_learns_from_or_sees(more: int) -> None:
    packed = pack([ONE, Sample((1, 2, 5, *range(more)), TWO.completion)])
    assert packed.ids.shape[1] == packed.positions.shape[1] == -(-(8 + more) // WHOLE) * WHOLE
    assert int(packed.predicts.max()) == 8 + more - 1
    rows, filled = len(packed.blocks.gather), packed.ids.shape[1] > 8 + more
    assert rows == 2 + filled
    assert set(packed.rows.tolist()) == {0, 1}


def test_every_completion_token_is_predicted_from_the_token_before_it() -> None:
    packed = pack([ONE, TWO])
    assert packed.targets.tolist() == [7, 9, 8, 8, 9]
    assert packed.ids[0, packed.predicts].tolist() == [4, 7, 5, 8, 8]
    assert packed.rows.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(("limit", "passes"), [(100, 1), (8, 1), (7, 2), (1, 2)])
def test_a_step_is_split_so_that_no_pass_exceeds_its_tokens(limit: int, passes: int) -> None:
    assert len(split([ONE, TWO], limit)) == passes
