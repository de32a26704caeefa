"""What verdicts and comparisons count for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.outcomes import sampled, verify

REQUESTS = [f"request-{number}" for number in range(4000)]


@pytest.mark.parametrize("observed", [0.1, 0.5, 1.0])
def test_however_often_a_version_is_looked_at_the_same_share_of_its_requests_counts(observed: float) -> None:
    looked_at = len(REQUESTS) * observed
    counted = sum(sampled(request, observed, 0.1) for request in REQUESTS[: round(looked_at)])
    assert counted / len(REQUESTS) == pytest.approx(0.1, abs=0.02)


@given(st.text(), st.floats(0.01, 1), st.floats(0, 1))
def test_what_is_looked_at_no_more_often_than_the_share_always_counts_and_with_no_share_nothing_does(
    request_id: str, observed: float, share: float
) -> None:
    assert sampled(request_id, observed, max(share, observed))
    assert not sampled(request_id, observed, 0.0)


def test_an_answer_that_was_not_given_is_judged_by_a_label_alone() -> None:
    assert verify("4", served=False, label=None, score=1.0, teacher="4") is None
    judged = verify("4", served=False, label="5", score=0.0, teacher="6")
    assert judged is not None and (judged.right, judged.win) == (False, True)
