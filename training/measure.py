"""How good a student is on held-back items, without generating: one pass gives loss and exactness.

Knows a student and packed examples; it refuses to know what the figures decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training import packing
from training.packing import Sample
from training.students import Student

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Measure:
    """The student on the validation items with the right prefix given: share exactly right, mean loss per token (nats)."""

    accuracy: float
    right: int
    n: int
    loss: float

    def better_than(self, other: Measure | None) -> bool:
        """More right, or as many at less loss."""
        return other is None or (self.right, -self.loss) > (other.right, -other.loss)


def measure(student: Student, samples: Sequence[Sample], *, pass_tokens: int, accelerator: Accelerator | None = None) -> Measure:
    """Exact answers and loss: an answer is exact if every token of it would have been chosen greedily.

    With an accelerator the passes are shared out between its processes, and each gets the whole result.
    """
    import torch

    was_training = student.model.training
    student.model.eval()
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    sums = torch.zeros(2, dtype=torch.float64, device=student.model.device)
    with torch.no_grad():
        for part in packing.split(samples, pass_tokens)[rank::world]:
            pack = packing.pack(part, student.model.device)
            logits = student.logits(pack)
            missed = pack.rows[logits.argmax(dim=-1) != pack.targets]
            sums[0] += torch.nn.functional.cross_entropy(logits, pack.targets, reduction="sum")
            sums[1] += len(part) - len(missed.unique())
    student.model.train(was_training)
    loss, right = (accelerator.reduce(sums, "sum") if accelerator else sums).tolist()
    tokens = sum(len(sample.completion) for sample in samples)
    return Measure(right / len(samples), round(right), len(samples), loss / tokens)
