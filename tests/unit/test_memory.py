"""The estimate before a training: what counts, what helps, and the refusal that says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from training.memory import GIB, NF4_BYTES, Shape, check, estimate
from training.recipe import TrainingFailed

SEVEN_BILLION = Shape(6_738_000_000, 262_000_000, 40_000_000, 32, 4096, 11008, 32000)


def found(shape: Shape = SEVEN_BILLION, **changes: Any) -> Any:
    known: dict[str, Any] = {
        "weight_bytes": NF4_BYTES,
        "compute_bytes": 2,
        "pass_tokens": 512,
        "supervised": 100,
        "recompute": "auto",
        "available": 80 * GIB,
    }
    return estimate(shape, **(known | changes))


def test_four_bits_hold_seven_billion_weights_in_less_than_four_gigabytes() -> None:
    assert 3.2 * GIB < found().weights < 4.2 * GIB


def test_training_every_weight_needs_sixteen_bytes_each_and_no_frozen_copy() -> None:
    every = found(replace(SEVEN_BILLION, trained=SEVEN_BILLION.parameters))
    assert every.weights == 0
    assert every.training == 16 * SEVEN_BILLION.parameters


def test_activations_are_recomputed_only_where_they_would_not_fit() -> None:
    roomy = found(pass_tokens=4096)
    tight = found(pass_tokens=4096, available=roomy.total * 0.7)
    assert (roomy.recompute, tight.recompute) == (False, True)
    assert tight.fits and tight.activations < roomy.activations / 10
    assert not found(pass_tokens=4096, available=roomy.total * 0.7, recompute="off").fits


def test_what_cannot_fit_is_refused_with_figures_and_advice() -> None:
    with pytest.raises(TrainingFailed, match=r"GiB needed of 2\.00 free.*lower pass_tokens"):
        check(found(available=2 * GIB))
