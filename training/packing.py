"""Put examples that share the beginning of their prompt into one forward pass, without padding.

The shared beginning is computed once and every example attends to it, to itself and to no other example, so losses and
gradients are those of separate passes at less cost (half for prompts that open with the same instruction).
Knows token ids; it refuses to know models and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from training import attention
from training.attention import Blocks

if TYPE_CHECKING:
    import torch

# Passes are filled up to whole multiples of so many tokens. Sizes that come again find their compiled kernels and their memory again:
# with every pass of a length of its own, a quarter of a CPU's time went into searching for free memory after 170 steps.
WHOLE = 32


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's log-probabilities (nats, temperature 1) at the first m tokens of a completion.

    Shapes: `ids` and `logprobs` [m, k], the k likeliest tokens; `tail` [m], the logarithm of all other tokens' mass.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray


@dataclass(frozen=True)
class Sample:
    """A rendered prompt and the completion to learn; the completion's last id is the stop token.

    `weight` multiplies its loss. `rejected` is a worse completion, with the stop token, and `reference` the log-probability by which
    the untrained student prefers the better one.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    weight: float = 1.0
    soft: SoftTargets | None = field(default=None, compare=False)
    rejected: tuple[int, ...] | None = None
    reference: float = 0.0

    def __len__(self) -> int:
        """Positions fed to the model: the last completion token is only ever predicted."""
        return len(self.prompt) + len(self.completion) - 1

    @property
    def tokens(self) -> float:
        """Supervised tokens, each counted by its weight."""
        return self.weight * len(self.completion)


@dataclass(frozen=True)
class Pack:
    """One forward pass. Shapes: ids and positions [1, n]; `blocks` say who may attend to whom; the rest [supervised].

    `predicts` are the positions whose next token is supervised, `targets` those tokens, `rows` the example each is from, `weights`
    what its loss counts (0 in a rejected completion). `soft_at` [m] are the supervised tokens with soft targets, which are
    `soft_ids` and `soft_logprobs` [m, k], `soft_tail` [m]. `pairs` [p, 2] are rows of better and worse completions, `reference` [p].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    blocks: Blocks | torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor
    soft_at: torch.Tensor
    soft_ids: torch.Tensor
    soft_logprobs: torch.Tensor
    soft_tail: torch.Tensor
    pairs: torch.Tensor
    reference: torch.Tensor


def shared_prefix(samples: Sequence[Sample]) -> int:
    """Tokens at the start of the prompts that all samples share, leaving each prompt at least its last token."""
    limit = min(len(sample.prompt) for sample in samples) - 1
    first, last = min(s.prompt for s in samples), max(s.prompt for s in samples)
    # the smallest and the largest in order share no more than any two samples do
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def cost(samples: Sequence[Sample]) -> int:
    """Tokens that a pass over these samples computes."""
    prefix = shared_prefix(samples)
    return prefix + sum(len(sample) - prefix for sample in _rows(samples))


def split(samples: Sequence[Sample], pass_tokens: int) -> list[list[Sample]]:
    """The samples of one optimiser step in passes of at most `pass_tokens` tokens; a longer sample goes alone.

    Neighbours in length go together: the rows of a pass are as wide as its longest for attention.
    """
    passes: list[list[Sample]] = []
    for sample in sorted(samples, key=len):
        if passes and cost([*passes[-1], sample]) <= pass_tokens:
            passes[-1].append(sample)
        else:
            passes.append([sample])
    return passes


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Pack:
    """The tensors of one pass over `samples`; a rejected completion is a row after the last sample."""
    import torch

    prefix = shared_prefix(samples)
    rows = _rows(samples)
    lengths = [len(sample) - prefix for sample in rows]
    starts = list(accumulate(lengths, initial=prefix))
    ids = list(rows[0].prompt[:prefix])
    predicts: list[int] = []
    for row, (sample, length) in enumerate(zip(rows, lengths, strict=True)):
        ids += (sample.prompt + sample.completion)[prefix:-1]
        end = starts[row] + length
        predicts += range(end - len(sample.completion), end)
    if spare := -len(ids) % WHOLE:  # a row that nobody learns from
        lengths.append(spare)
        ids += [0] * spare
    positions = [*range(prefix), *(p for length in lengths for p in range(prefix, prefix + length))]
    where = torch.tensor(predicts, device=device)
    targets = torch.tensor([t for sample in rows for t in sample.completion], device=device)
    owners = torch.tensor([row for row, sample in enumerate(rows) for _ in sample.completion], device=device)
    weights = torch.tensor([sample.weight for sample in rows for _ in sample.completion], device=device)
    paired = [(row, sample.reference) for row, sample in enumerate(samples) if sample.rejected]
    pairs = torch.tensor([[row, len(samples) + i] for i, (row, _) in enumerate(paired)], dtype=torch.long, device=device).reshape(-1, 2)
    reference = torch.tensor([margin for _, margin in paired], device=device)
    return Pack(
        *(_row(ids, device), _row(positions, device), attention.layout(prefix, lengths, device), where, targets, owners, weights),
        *_soft(rows, device),
        *(pairs, reference),
    )


def _rows(samples: Sequence[Sample]) -> list[Sample]:
    """What a pass computes: the samples, then the rejected completions."""
    return [*samples, *(Sample(sample.prompt, sample.rejected, weight=0.0) for sample in samples if sample.rejected)]


def _soft(rows: Sequence[Sample], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    starts = accumulate((len(sample.completion) for sample in rows), initial=0)
    found = [(start, sample.soft) for start, sample in zip(starts, rows, strict=False) if sample.soft]
    if not found:
        none, nothing = torch.empty(0, dtype=torch.long, device=device), torch.empty(0, device=device)
        return none, none, nothing, nothing
    at = np.concatenate([np.arange(start, start + len(soft.tail)) for start, soft in found])
    ids, logprobs, tail = (np.concatenate([getattr(soft, name) for _, soft in found]) for name in ("ids", "logprobs", "tail"))
    return (
        torch.as_tensor(at, device=device),
        torch.as_tensor(ids, dtype=torch.long, device=device),
        torch.as_tensor(logprobs, dtype=torch.float32, device=device),
        torch.as_tensor(tail, dtype=torch.float32, device=device),
    )


def _row(values: list[int], device: torch.device | str) -> torch.Tensor:
    import torch

    return torch.tensor([values], device=device)
