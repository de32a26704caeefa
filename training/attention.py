"""Attention within a pass of packed examples, computed row by row instead of over the whole pass.

A pass of n tokens with a mask costs n² scores though a token attends to its own example and the shared beginning alone; here the rows
are laid beside each other, padded to the longest, each with the shared beginning's keys before its own. The same values at a fraction
of the cost. On a GPU a short pass is one masked square all the same: there launching a kernel costs more than what it computes.
Registered with transformers by name; knows tensors, and refuses to know models and data.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "packed-rows"
SHORT = 192  # tokens of a row
WHOLE = 8  # rows are padded to a whole multiple of so many tokens: sizes that come again find their kernels and memory again
SQUARE = 2048  # tokens of a pass, up to which a GPU attends over all of it


@dataclass(frozen=True)
class Blocks:
    """Where the rows of a pass are: `prefix` shared tokens first, then one row after another.

    Shapes: `gather` [rows, longest], the pass's position of each token of a row (padding repeats its first); `scatter`
    [tokens after the prefix], where each is in the flattened [rows · longest]; `mask` [rows, 1, longest, prefix + longest], true = may
    attend.
    """

    prefix: int
    gather: torch.Tensor
    scatter: torch.Tensor
    mask: torch.Tensor


def layout(prefix: int, lengths: Sequence[int], device: torch.device | str) -> Blocks | torch.Tensor:
    """How a pass is attended over: where a GPU has a short one by its `square`, else in `blocks`."""
    import torch

    if torch.device(device).type == "cuda" and prefix + sum(lengths) <= SQUARE:
        return square(prefix, lengths).to(device)
    return blocks(prefix, lengths, device)


def blocks(prefix: int, lengths: Sequence[int], device: torch.device | str) -> Blocks:
    """The blocks of a pass whose rows have these lengths after a shared beginning of `prefix` tokens."""
    import torch

    # made on the CPU and sent, so that a GPU need not be waited for
    sizes, longest = torch.tensor(list(lengths)), -(-max(lengths) // WHOLE) * WHOLE
    starts = prefix + sizes.cumsum(0) - sizes
    column = torch.arange(longest)
    real = column < sizes[:, None]
    gather = torch.where(real, starts[:, None] + column, starts[:, None])
    causal = (column[None, :] <= column[:, None]).expand(len(lengths), 1, longest, longest)
    mask = torch.cat([causal.new_ones(len(lengths), 1, longest, prefix), causal], dim=-1)
    return Blocks(prefix, gather.to(device), real.flatten().nonzero()[:, 0].to(device), mask.to(device))


def square(prefix: int, lengths: Sequence[int]) -> torch.Tensor:
    """Who may attend to whom in a pass of n tokens: [1, 1, n, n], each token to the shared beginning and to its own row, up to itself."""
    import torch

    owner = torch.repeat_interleave(torch.arange(-1, len(lengths)), torch.tensor([prefix, *lengths]))
    return ((owner == -1) | (owner == owner[:, None])).tril()[None, None]


def register() -> str:
    """Make this attention known to transformers; returns its name, for `set_attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    return NAME


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    blocks: Blocks | torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Returns [1, n, heads, size]. Shapes: query [1, heads, n, size], key and value [1, key heads, n, size]."""
    import torch

    groups = query.shape[1] // key.shape[1]
    if isinstance(blocks, torch.Tensor):
        keys, values = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=blocks, scale=scaling)
        return out.transpose(1, 2), None
    wide = [tensor[0].repeat_interleave(repeats, 0).transpose(0, 1) for tensor, repeats in ((query, 1), (key, groups), (value, groups))]
    rows, longest = blocks.gather.shape
    flat = blocks.gather.flatten()
    q, k, v = (tensor.index_select(0, flat).view(rows, longest, *tensor.shape[1:]).transpose(1, 2) for tensor in wide)
    parts = []
    if blocks.prefix:
        first_q, first_k, first_v = (tensor[: blocks.prefix].transpose(0, 1)[None] for tensor in wide)
        first = torch.nn.functional.scaled_dot_product_attention(first_q, first_k, first_v, is_causal=True, scale=scaling)
        parts.append(first[0].transpose(0, 1))
        k, v = (torch.cat([part.expand(rows, -1, -1, -1), own], dim=2) for part, own in ((first_k, k), (first_v, v)))
    with _kernel(query, longest):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=blocks.mask, scale=scaling)
    parts.append(out.transpose(1, 2).reshape(rows * longest, *wide[0].shape[1:]).index_select(0, blocks.scatter))
    return torch.cat(parts)[None], None


def _kernel(query: torch.Tensor, longest: int) -> AbstractContextManager[Any]:
    """Torch's fused kernel on a CPU works in blocks larger than short rows: its backward pass then costs more than the plain formula."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = query.device.type == "cpu" and longest <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
