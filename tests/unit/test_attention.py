"""Attention row by row is attention under the mask it stands for: no row sees another, none sees its future."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.attention import attend, blocks, square

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def full_mask(prefix: int, lengths: list[int]) -> torch.Tensor:
    """Who may attend to whom in the pass as one square, written down directly."""
    owner = torch.tensor([-1] * prefix + [row for row, length in enumerate(lengths) for _ in range(length)])
    return ((owner == -1) | (owner == owner[:, None])).tril()


def inputs(n: int) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(n)
    return [
        torch.randn(1, heads, n, SIZE, generator=made, dtype=torch.float64, requires_grad=True) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.booleans())
def test_values_and_gradients_are_those_of_one_masked_square(prefix: int, lengths: list[int], at_once: bool) -> None:
    query, key, value = inputs(prefix + sum(lengths))
    where = square(prefix, lengths) if at_once else blocks(prefix, lengths, "cpu")
    found, _ = attend(None, query, key, value, None, scaling=0.3, blocks=where)
    wide = [tensor.repeat_interleave(HEADS // KEY_HEADS, 1) for tensor in (key, value)]
    mask = full_mask(prefix, lengths)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *wide, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weight = torch.arange(found.numel(), dtype=found.dtype).reshape(found.shape)
    mine = torch.autograd.grad((found * weight).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_row_is_the_same_whatever_its_neighbours_hold() -> None:
    query, key, value = (tensor.detach() for tensor in inputs(9))
    where = blocks(2, [3, 4], "cpu")
    before, _ = attend(None, query, key, value, None, scaling=0.3, blocks=where)
    for tensor in (query, key, value):
        tensor[:, :, 5:] = 100.0
    after, _ = attend(None, query, key, value, None, scaling=0.3, blocks=where)
    assert torch.equal(before[:, :5], after[:, :5])
