from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.routing.promises import PromiseSettings, keep
from tutelage.routing.selection import Offer, best_value, cheapest_within, most_able

CHEAP, MIDDLE, DEAR = Offer("cheap", 0.70, 1.0), Offer("middle", 0.85, 4.0), Offer("dear", 0.90, 20.0)
ALL = [CHEAP, MIDDLE, DEAR]
offers = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 10)), min_size=1, max_size=6).map(
    lambda pairs: [Offer(f"m{i}", *pair) for i, pair in enumerate(pairs)]
)


def test_the_most_able_model_is_asked_and_of_equals_the_cheapest() -> None:
    assert most_able(ALL).model == "dear"
    assert most_able([*ALL, Offer("bargain", 0.90, 2.0)]).model == "bargain"


@pytest.mark.parametrize(("margin", "model"), [(0.04, "dear"), (0.06, "middle")])
def test_a_favourite_stays_unless_another_is_better_by_more_than_the_margin(margin: float, model: str) -> None:
    assert most_able(ALL, favourite="middle", margin=margin).model == model


@pytest.mark.parametrize(("slack", "model"), [(-1.0, "dear"), (0.04, "dear"), (0.06, "middle"), (0.25, "cheap")])
def test_the_cheapest_model_within_the_slack_is_asked(slack: float, model: str) -> None:
    assert cheapest_within(ALL, reference="dear", slack=slack).model == model


def test_a_dearer_model_than_the_reference_is_never_asked() -> None:
    assert cheapest_within(ALL, reference="middle", slack=-1.0).model == "middle"
    assert cheapest_within(ALL, reference="middle", slack=0.0).model == "middle"


def test_a_reference_without_an_offer_is_refused() -> None:
    with pytest.raises(ValueError, match="the reference gpt is not among the offers: cheap, middle, dear"):
        cheapest_within(ALL, reference="gpt", slack=0.1)


@pytest.mark.parametrize(("price", "model"), [(0.0, "dear"), (0.01, "middle"), (1.0, "cheap")])
def test_a_higher_price_of_cost_saves_more(price: float, model: str) -> None:
    assert best_value(ALL, price=price).model == model


def test_no_offer_is_refused() -> None:
    with pytest.raises(ValueError, match="ask at least one"):
        most_able([])


@given(offers, st.floats(-1, 1), st.floats(0, 1))
def test_more_slack_never_costs_more(made: list[Offer], slack: float, more: float) -> None:
    cost = {offer.model: offer.cost for offer in made}
    reference = made[0].model
    tight = cheapest_within(made, reference=reference, slack=slack)
    loose = cheapest_within(made, reference=reference, slack=slack + more)
    assert cost[loose.model] <= cost[tight.model]
    assert tight.reason and loose.reason


def outcomes(n: int, losses: list[float], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quality of candidates that lose so much on average, of the reference, always 1, and the share each candidate moves."""
    random = np.random.default_rng(seed)
    return (random.random((n, 1)) >= losses).astype(float), np.ones(n), np.linspace(0.2, 0.9, len(losses))


def test_the_boldest_candidate_that_surely_keeps_the_promise_is_chosen() -> None:
    promise = keep(*outcomes(2000, [0.0, 0.01, 0.02, 0.10]))
    assert promise.candidate == 2
    assert promise.loss == pytest.approx(0.02, abs=0.01)


def test_a_chance_dip_before_the_limit_does_not_end_the_search() -> None:
    routed, reference, moved = outcomes(2000, [0.0, 0.005, 0.01, 0.015, 0.10])
    routed[:110, 1] = 0.0  # the second candidate seems to lose 5.5 %
    assert keep(routed, reference, moved).candidate == 3


def test_a_promise_that_nothing_keeps_stays_with_the_reference() -> None:
    assert keep(*outcomes(2000, [0.2])).candidate is None


def test_too_few_outcomes_promise_nothing_and_say_so() -> None:
    promise = keep(*outcomes(99, [0.0]))
    assert promise.candidate is None
    assert "only 99 outcomes" in promise.reason


def test_the_promise_is_kept_as_often_as_it_says() -> None:
    """Every candidate's true loss is known; a chosen one breaks the promise in a window of 1,000 at most as often as stated."""
    broken = 0
    for seed in range(200):
        losses = list(np.linspace(0.0, 0.1, 21))
        promise = keep(*outcomes(1000, losses, seed), PromiseSettings())
        window = np.random.default_rng([seed, 1]).random(1000) < losses[promise.candidate or 0]
        broken += window.mean() > 0.05
    assert broken <= 200 * PromiseSettings().risk
