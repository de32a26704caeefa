"""From the last position's logits to the next token, per row. Knows torch tensors and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """How one row picks its next token. `generator` is needed exactly when `temperature` > 0."""

    temperature: float
    top_p: float
    generator: torch.Generator | None


def choose(logits: torch.Tensor, rows: Sequence[Sampling]) -> torch.Tensor:
    """Return the next token id of every row, [rows] int64, from float logits [rows, vocabulary].

    A row's draw depends only on its own logits and generator, never on its neighbours in the batch.
    """
    chosen = logits.argmax(dim=-1)
    for index, row in enumerate(rows):
        if row.temperature > 0:
            chosen[index] = _draw(logits[index], row)
    return chosen


def _draw(logits: torch.Tensor, row: Sampling) -> torch.Tensor:
    import torch

    # Subtracting the maximum first keeps tiny temperatures from overflowing into NaN.
    probabilities = torch.softmax((logits - logits.max()) / row.temperature, dim=-1)
    if row.top_p < 1.0:
        probabilities = _nucleus(probabilities, row.top_p)
    # The generator lives on the CPU so that a seed gives the same draw with and without a GPU.
    return torch.multinomial(probabilities.cpu(), 1, generator=row.generator)[0]


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of tokens whose probability reaches `top_p`; at least one always stays."""
    ordered, order = probabilities.sort(descending=True)
    beyond = ordered.cumsum(dim=-1) - ordered >= top_p
    beyond[0] = False
    kept = probabilities.clone()
    kept[order[beyond]] = 0.0
    return kept
