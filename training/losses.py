"""Losses of a student: cross-entropy with the recorded answer, divergence from a teacher's probabilities, preference between answers.

A sum over tokens is divided by the `tokens` of the whole optimiser step, so a step split into passes or over processes has
the gradient of the undivided one. Knows tensors; it refuses to know models, files and where a teacher's probabilities came from.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

TEMPERATURE = 2.0
ALPHA = 0.7
LEAST_LOGPROB = -40.0  # a tail of no mass: keeps 0 · log 0 a zero

Direction = Literal["forward", "reverse"]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, *, tokens: float) -> torch.Tensor:
    """Weighted negative log-likelihood in nats over `tokens`. Shapes: logits [n, vocabulary], targets and weights [n]."""
    import torch

    return (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / tokens


def distillation(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
    *,
    tokens: float,
    temperature: float = TEMPERATURE,
    alpha: float = ALPHA,
    direction: Direction = "forward",
) -> torch.Tensor:
    """α·T²·KL + (1 − α)·CE (Hinton et al. 2015, arXiv 1503.02531; T² keeps the gradient's size whatever T).

    Shapes: logits [n, vocabulary]; targets, weights, tail_logprob [n]; top_ids, top_logprobs [n, k], at temperature 1.
    """
    apart = divergence(logits, top_ids, top_logprobs, tail_logprob, temperature=temperature, direction=direction)
    soft = (apart * weights).sum() / tokens
    return alpha * temperature**2 * soft + (1 - alpha) * cross_entropy(logits, targets, weights, tokens=tokens)


def divergence(
    logits: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
    tail_logprob: torch.Tensor,
    *,
    temperature: float,
    direction: Direction = "forward",
) -> torch.Tensor:
    """KL in nats for each token, [n], over the teacher's top k tokens and one bucket for all others.

    Without the bucket a student learns the top k renormalised and grows over-confident (arXiv 2503.16870). The teacher's tail is known at
    temperature 1 only; at T it is taken as V − k equal tokens. At k = V there is no bucket, and this is the dense KL.
    `forward` is KL(teacher ‖ student), which covers; `reverse` is KL(student ‖ teacher), which seeks modes (MiniLLM, arXiv 2306.08543).
    """
    import torch

    rest = logits.shape[-1] - top_ids.shape[-1]
    scaled = logits / temperature
    student = torch.log_softmax(scaled, dim=-1).gather(-1, top_ids)
    teacher = top_logprobs / temperature
    if rest:
        others = scaled.scatter(-1, top_ids, -math.inf).logsumexp(-1) - scaled.logsumexp(-1)
        student = torch.cat([student, others[:, None]], dim=-1)
        spread = tail_logprob.clamp(min=LEAST_LOGPROB) / temperature + (1 - 1 / temperature) * math.log(rest)
        teacher = torch.cat([teacher, spread[:, None]], dim=-1)
    teacher = torch.log_softmax(teacher.clamp(min=LEAST_LOGPROB), dim=-1)
    left, right = (teacher, student) if direction == "forward" else (student, teacher)
    return (left.exp() * (left - right)).sum(-1)


def preference(
    chosen: torch.Tensor, rejected: torch.Tensor, reference_chosen: torch.Tensor, reference_rejected: torch.Tensor, *, beta: float = 0.1
) -> torch.Tensor:
    """DPO (arXiv 2305.18290) for each pair, [pairs]: −log σ(β·(student's margin − reference's margin)).

    Each argument holds the summed log-probabilities, in nats, of whole answers, [pairs]; `reference` is the untrained student.
    """
    import torch

    margin = (chosen - rejected) - (reference_chosen - reference_rejected)
    return -torch.nn.functional.logsigmoid(beta * margin)
