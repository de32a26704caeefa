"""Losses: equal to the dense formula where that is known, and the same however a step is divided."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import losses

VOCABULARY = 11


def case(seed: int, n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits, targets, weights, and the teacher's log-probabilities [n, VOCABULARY]."""
    made = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, VOCABULARY, generator=made, dtype=torch.float64) * 3
    teacher = torch.log_softmax(torch.randn(n, VOCABULARY, generator=made, dtype=torch.float64) * 3, -1)
    return logits, torch.randint(VOCABULARY, (n,), generator=made), torch.rand(n, generator=made, dtype=torch.float64) + 0.5, teacher


def top(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kept, ids = teacher.topk(k, -1)
    return ids, kept, torch.log1p(-kept.exp().sum(-1).clamp(max=1.0))


def dense(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    student = torch.log_softmax(logits / temperature, -1)
    return torch.nn.functional.kl_div(student, torch.log_softmax(teacher / temperature, -1), log_target=True, reduction="none").sum(-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 5))
def test_with_every_token_kept_the_divergence_is_the_dense_one(seed: int, temperature: float) -> None:
    logits, _, _, teacher = case(seed)
    found = losses.divergence(logits, *top(teacher, VOCABULARY), temperature=temperature)
    torch.testing.assert_close(found, dense(logits, teacher, temperature))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, VOCABULARY - 1), st.sampled_from(["forward", "reverse"]))
def test_the_divergence_is_never_negative_and_joining_tokens_never_raises_it(seed: int, k: int, direction: losses.Direction) -> None:
    logits, _, _, teacher = case(seed)
    bucketed = losses.divergence(logits, *top(teacher, k), temperature=1.0, direction=direction)
    whole = losses.divergence(logits, *top(teacher, VOCABULARY), temperature=1.0, direction=direction)
    assert (bucketed >= -1e-9).all()
    assert (bucketed <= whole + 1e-9).all()


@pytest.mark.parametrize("k", [3, VOCABULARY])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_equal_to_its_teacher_has_no_divergence_left(k: int, direction: losses.Direction) -> None:
    _, _, _, teacher = case(1)
    apart = losses.divergence(teacher, *top(teacher, k), temperature=1.0, direction=direction)
    torch.testing.assert_close(apart, torch.zeros_like(apart))


def test_reverse_exchanges_the_two_sides() -> None:
    logits, _, _, teacher = case(2)
    found = losses.divergence(logits, *top(teacher, VOCABULARY), temperature=1.0, direction="reverse")
    torch.testing.assert_close(found, dense(teacher, torch.log_softmax(logits, -1), 1.0))


def test_a_tail_without_mass_gives_finite_gradients() -> None:
    logits = torch.randn(2, VOCABULARY, requires_grad=True)
    ids, kept = torch.tensor([[0, 1], [2, 3]]), torch.log(torch.tensor([[0.5, 0.5], [1.0, 1e-30]]))
    for direction in ("forward", "reverse"):
        losses.divergence(logits, ids, kept, torch.full((2,), -math.inf), temperature=2.0, direction=direction).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_the_defaults_mix_seven_tenths_of_the_divergence_at_temperature_two() -> None:
    logits, targets, weights, teacher = case(3)
    found = losses.distillation(logits, targets, weights, *top(teacher, VOCABULARY), tokens=6)
    soft = (dense(logits, teacher, 2.0) * weights).sum() / 6
    hard = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / 6
    torch.testing.assert_close(found, 0.7 * 4 * soft + 0.3 * hard)


@pytest.mark.parametrize("parts", [[6], [1, 5], [2, 2, 2], [1, 1, 1, 1, 1, 1]])
def test_the_gradient_does_not_depend_on_how_a_step_is_divided(parts: list[int]) -> None:
    logits, targets, weights, teacher = case(4)
    whole, divided = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses.distillation(whole, targets, weights, *top(teacher, 4), tokens=6).backward()
    pieces = [tensor.split(parts) for tensor in (divided, targets, weights, *top(teacher, 4))]
    for piece in zip(*pieces, strict=True):
        losses.distillation(*piece, tokens=6).backward()
    assert whole.grad is not None and divided.grad is not None
    torch.testing.assert_close(whole.grad, divided.grad)


def test_a_preference_costs_less_the_further_the_student_is_ahead_of_its_reference() -> None:
    reference = torch.tensor([-5.0, -5.0, -5.0])
    lost = losses.preference(torch.tensor([-9.0, -5.0, -1.0]), reference, reference, reference, beta=0.5)
    assert lost[0] > lost[1] > lost[2]
    assert lost[1].item() == pytest.approx(math.log(2))
