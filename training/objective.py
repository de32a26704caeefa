"""What one pass costs: which loss each supervised token of a pack takes, by what it carries.

Joins packs and losses by the recipe. It refuses to know the loop and where soft targets and preferences came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from training import losses, packing
from training.packing import Pack, Sample
from training.recipe import FinetuneSettings
from training.students import Student

if TYPE_CHECKING:
    import torch


def loss(logits: torch.Tensor, pack: Pack, config: FinetuneSettings, *, tokens: float, pairs: int) -> torch.Tensor:
    """This pass's share of a step with `tokens` supervised tokens, counted by weight, and `pairs` preferences.

    A token with soft targets takes α·T²·KL + (1 − α)·CE, any other CE alone; each pair of answers adds DPO.
    """
    import torch

    if len(pack.soft_at):
        hard = torch.ones(len(pack.targets), dtype=torch.bool, device=logits.device)
        hard[pack.soft_at] = False
        at = pack.soft_at
        total = losses.cross_entropy(logits[hard], pack.targets[hard], pack.weights[hard], tokens=tokens) + losses.distillation(
            *(logits[at], pack.targets[at], pack.weights[at], pack.soft_ids, pack.soft_logprobs, pack.soft_tail),
            tokens=tokens,
            temperature=config.distill_temperature,
            alpha=config.distill_alpha,
            direction=config.distill_direction,
        )
    else:
        total = losses.cross_entropy(logits, pack.targets, pack.weights, tokens=tokens)
    if len(pack.pairs):
        said = answer_logprobs(logits, pack)
        chosen, rejected = said[pack.pairs[:, 0]], said[pack.pairs[:, 1]]
        apart = losses.preference(chosen, rejected, pack.reference, torch.zeros_like(rejected), beta=config.preference_beta)
        total = total + config.preference_weight * apart.sum() / pairs
    return total


def answer_logprobs(logits: torch.Tensor, pack: Pack) -> torch.Tensor:
    """The log-probability (nats) of each row's whole completion, [rows]."""
    import torch

    said = -torch.nn.functional.cross_entropy(logits, pack.targets, reduction="none")
    return said.new_zeros(int(pack.rows.max()) + 1).index_add(0, pack.rows, said)


def with_reference(untrained: Student, samples: Sequence[Sample], *, pass_tokens: int) -> list[Sample]:
    """The samples, those with a rejected completion knowing by how much the untrained student prefers the better one."""
    import torch

    paired = [sample for sample in samples if sample.rejected]
    margins: dict[int, float] = {}
    with torch.no_grad():
        for part in packing.split(paired, pass_tokens):
            pack = packing.pack(part, untrained.model.device)
            said = answer_logprobs(untrained.logits(pack), pack)
            for sample, (better, worse) in zip(part, pack.pairs.tolist(), strict=True):
                margins[id(sample)] = (said[better] - said[worse]).item()
    return [replace(sample, reference=margins[id(sample)]) if sample.rejected else sample for sample in samples]
