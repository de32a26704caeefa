"""What a student is expected to save."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.savings import expected


def test_what_the_student_is_sure_of_costs_its_answer_and_the_rest_both() -> None:
    found = expected(cost_microusd=60_000, requests=100, requests_per_day=1000, share=0.75, student_microusd=20)

    assert (found.before, found.after) == (600, 170)
    assert found.per_day == pytest.approx(430_000)
    assert "75%" in found.reason


@given(st.floats(0, 1e6), st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1000))
def test_a_student_that_is_sure_of_nothing_never_saves(cost: float, requests: int, share: float, answer: float) -> None:
    assert expected(cost_microusd=cost, requests=requests, requests_per_day=1, share=0.0, student_microusd=answer).per_day <= 1e-9
    assert expected(cost_microusd=cost, requests=requests, requests_per_day=1, share=share, student_microusd=answer).after >= 0
