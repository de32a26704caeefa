"""Which of several models a request goes to, from estimates made before the call: three rules for three wishes.

Pure: values in, a frozen record with its reason out. Knows nothing of how estimates or prices were found, nor of what was promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Offer:
    """What one model would do for a request: the probability of an acceptable answer, and its expected cost (any one unit)."""

    model: str
    probability: float
    cost: float = 0.0


@dataclass(frozen=True)
class Selection:
    """The model that is asked."""

    model: str
    reason: str


def most_able(offers: Sequence[Offer], *, favourite: str | None = None, margin: float = 0.0) -> Selection:
    """The highest expected quality; of equals the cheapest, then the first by name. Raises ValueError without an offer.

    A `favourite` stays unless another is better by more than `margin`: the best of many estimates is partly the luckiest.
    """
    best = min(_some(offers), key=lambda offer: (-offer.probability, offer.cost, offer.model))
    known = next((offer for offer in offers if offer.model == favourite), best)
    if best.probability - known.probability <= margin and known is not best:
        return Selection(known.model, f"{best.model} is better than {known.model} by no more than {margin:.2f}")
    return Selection(best.model, f"{best.model} has the highest expected quality, {best.probability:.2f}")


def cheapest_within(offers: Sequence[Offer], *, reference: str, slack: float) -> Selection:
    """The cheapest model whose expected quality is at most `slack` below the reference's; the reference always is one.

    Models that cost more than the reference are not looked at. Raises ValueError when the reference made no offer.
    """
    against = next((offer for offer in _some(offers) if offer.model == reference), None)
    if against is None:
        raise ValueError(f"the reference {reference} is not among the offers: {', '.join(offer.model for offer in offers)}")
    able = [o for o in offers if o is against or (o.cost <= against.cost and against.probability - o.probability <= slack)]
    best = min(able, key=lambda offer: (offer.cost, -offer.probability, offer.model))
    if best is against:
        return Selection(
            reference, f"no cheaper model comes within {slack:.3f} of {reference}'s expected quality {against.probability:.2f}"
        )
    return Selection(
        best.model, f"{best.model} at {best.probability:.2f} is within {slack:.3f} of {reference} at {against.probability:.2f}"
    )


def best_value(offers: Sequence[Offer], *, price: float) -> Selection:
    """The highest expected quality less `price` for each unit of cost: a higher price saves more."""
    best = min(_some(offers), key=lambda offer: (price * offer.cost - offer.probability, offer.cost, offer.model))
    return Selection(best.model, f"{best.model} has the best expected quality for its cost at {price:.3g} a unit")


def _some(offers: Sequence[Offer]) -> Sequence[Offer]:
    if not offers:
        raise ValueError("no model made an offer; ask at least one")
    return offers
