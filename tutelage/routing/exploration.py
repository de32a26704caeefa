"""A small share of requests is routed by chance, with the probability on record: what another policy would have done can only be told
from what was sometimes done. Pure: the random numbers are arguments.

Two things are drawn. Where a student tries, how sure it must be: as planned, only `floor`, or never enough (a third of the share each),
so nothing below the floor is ever given. Where one model answers alone, which one: each of those that may, with the same probability.
It refuses to know what is learned from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tutelage.routing.strategies import Plan, Step

NEVER = 2.0  # no confidence reaches it


@dataclass(frozen=True)
class Exploration:
    """`share`: of requests that are drawn; `floor`: the least confidence at which a drawn answer may be given."""

    share: float
    floor: float


def explore(plan: Plan, exploration: Exploration, *, drawn: float, which: float) -> Plan:
    """The plan as it is carried out; `drawn` and `which` are uniform in [0, 1)."""
    stops = [step for step in plan.steps if step.least is not None]
    if not exploration.share or not plan.steps or (not stops and not plan.others):
        return plan
    hit = drawn < exploration.share
    if not stops:
        return _another(plan, exploration.share, which if hit else None)
    if not hit or (kind := int(which * 3)) == 0:
        return plan
    chosen = tuple(_relaxed(step, exploration.floor) if kind == 1 else replace(step, least=NEVER) for step in plan.steps if step in stops)
    return replace(plan, steps=(*chosen, *(step for step in plan.steps if step not in stops)), explored=True)


def propensity(plan: Plan, exploration: Exploration, confidences: Sequence[float], *, given: bool) -> float:
    """The probability, over what is drawn, that a planned cascade ends where it did: after answers of these `confidences`, the last of
    which was `given` (or none was, and the model behind them answered). `plan` is the one before anything was drawn."""
    stops = [step for step in plan.steps if step.least is not None]
    third = exploration.share / 3
    likely = 0.0
    for weight, leasts in (
        (1 - 2 * third, [step.least or 0.0 for step in stops]),
        (third, [_relaxed(step, exploration.floor).least or 0.0 for step in stops]),
        (third, [NEVER] * len(stops)),
    ):
        reached = [confidence >= least for confidence, least in zip(confidences, leasts, strict=False)]
        ends_so = bool(reached) and reached[-1] and not any(reached[:-1]) if given else not any(reached)
        likely += weight if ends_so else 0.0
    return likely


def _relaxed(step: Step, floor: float) -> Step:
    return replace(step, least=min(step.least or 0.0, floor))


def _another(plan: Plan, share: float, which: float | None) -> Plan:
    everybody = [plan.steps[-1].candidate, *plan.others]
    each = share / len(everybody)
    index = 0 if which is None else int(which * len(everybody))
    if index == 0:
        return replace(plan, propensity=1 - share + each)
    reason = f"drawn by chance in place of {everybody[0].name}: {plan.reason}"
    step = replace(plan.steps[-1], candidate=everybody[index])
    return replace(plan, steps=(*plan.steps[:-1], step), shape="direct", reason=reason, explored=True, propensity=each)
