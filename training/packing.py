"""Put examples that share the beginning of their prompt into one forward pass, without padding.

The shared beginning is computed once and every example attends to it, to itself and to no other example, so losses and
gradients are those of separate passes at less cost (half for prompts that open with the same instruction).
Knows token ids; it refuses to know models and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sample:
    """A rendered prompt and the completion to learn; the completion's last id is the stop token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        """Positions fed to the model: the last completion token is only ever predicted."""
        return len(self.prompt) + len(self.completion) - 1


@dataclass(frozen=True)
class Pack:
    """One forward pass. Shapes: ids and positions [1, n], mask [1, 1, n, n] (true = may attend), the rest [supervised].

    `predicts` are the positions whose next token is supervised, `targets` those tokens, `rows` the example each is from.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor


def shared_prefix(samples: Sequence[Sample]) -> int:
    """Tokens at the start of the prompts that all samples share, leaving each prompt at least its last token."""
    limit = min(len(sample.prompt) for sample in samples) - 1
    first, last = min(s.prompt for s in samples), max(s.prompt for s in samples)
    # the smallest and the largest in order share no more than any two samples do
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def cost(samples: Sequence[Sample]) -> int:
    """Tokens that a pass over these samples computes."""
    prefix = shared_prefix(samples)
    return prefix + sum(len(sample) - prefix for sample in samples)


def split(samples: Sequence[Sample], pass_tokens: int) -> list[list[Sample]]:
    """The samples of one optimiser step in passes of at most `pass_tokens` tokens; a longer sample goes alone."""
    passes: list[list[Sample]] = []
    for sample in samples:
        if passes and cost([*passes[-1], sample]) <= pass_tokens:
            passes[-1].append(sample)
        else:
            passes.append([sample])
    return passes


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Pack:
    """The tensors of one pass over `samples`."""
    import torch

    prefix = shared_prefix(samples)
    lengths = [len(sample) - prefix for sample in samples]
    starts = list(accumulate(lengths, initial=prefix))
    ids, owner = list(samples[0].prompt[:prefix]), [-1] * prefix
    predicts: list[int] = []
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        ids += (sample.prompt + sample.completion)[prefix:-1]
        owner += [row] * length
        end = starts[row] + length
        predicts += range(end - len(sample.completion), end)
    owners = torch.tensor(owner, device=device)
    mask = ((owners == -1) | (owners == owners[:, None])).tril()
    positions = [*range(prefix), *(p for length in lengths for p in range(prefix, prefix + length))]
    where = torch.tensor(predicts, device=device)
    targets = torch.tensor([t for sample in samples for t in sample.completion], device=device)
    return Pack(_row(ids, device), _row(positions, device), mask[None, None], where, targets, owners[where])


def _row(values: list[int], device: torch.device | str) -> torch.Tensor:
    import torch

    return torch.tensor([values], device=device)
