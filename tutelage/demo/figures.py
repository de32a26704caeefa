"""How the figures of an outcome are written for people, the same on the terminal and on the page.

Text only: it refuses to know tables, colours and markup.
"""

from __future__ import annotations

from tutelage.demo.outcome import PHASES, Group, Interval, Outcome, Slice
from tutelage.demo.quarters import Quarter

MISSING = "–"


def share(value: float | None) -> str:
    """0.4567 as 46 %; 0.996 as 99.6 %, so that almost all is not written as all."""
    if value is None:
        return MISSING
    close_to_an_end = 0.0 < abs(value) < 0.01 or 0.99 < abs(value) < 1.0
    return f"{100 * value:.1f} %" if close_to_an_end else f"{100 * value:.0f} %"


def score(value: float | None) -> str:
    """An accuracy or an error in 0..1 with two digits, three where two would round it to 1."""
    if value is None:
        return MISSING
    return f"{value:.3f}" if 0.995 <= value < 1.0 else f"{value:.2f}"


def score_within(interval: Interval | None) -> str:
    return "" if interval is None else f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def share_within(interval: Interval | None) -> str:
    return "" if interval is None else f"[{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def usd(value: float | None) -> str:
    """US dollars with at least three significant digits: bills here are often parts of a cent."""
    if value is None:
        return MISSING
    digits = next((d for d, floor in ((2, 1.0), (3, 0.1), (4, 0.01)) if abs(value) >= floor), 5)
    return f"${value:,.{2 if value == 0 else digits}f}"


def seconds(value: float) -> str:
    """4.2 s, 75 s as 1:15 min, an hour and more as 1:02:03 h."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def by_students(part: Slice) -> float:
    """Share of requests answered afresh by students and TAs."""
    return part.share_by_tier["student"] + part.share_by_tier["ta"]


def shown(outcome: Outcome) -> tuple[Group, ...]:
    """The groups of traffic worth showing: the learnable tasks only where they are not all of it."""
    everything, learnable = outcome.traffic["all"], outcome.traffic["learnable"]
    same = all(everything[phase].n == learnable[phase].n for phase in PHASES)
    return ("all",) if same else ("all", "learnable")


def waited(value: float | None) -> str:
    """0.0042 as 4 ms, 1.234 as 1.23 s."""
    if value is None:
        return MISSING
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def headline(outcome: Outcome) -> str:
    """The one sentence of a demo, over all its traffic, good or bad."""
    if outcome.day is not None and outcome.day.quarters:
        return _headline_of_day(outcome.day.quarters[-1], len(outcome.day.quarters))
    after, saved = outcome.traffic["all"]["after"], outcome.savings["all"].share
    if saved is None or after.n == 0:
        return "No unseen traffic was replayed, so nothing can be said about savings yet"
    moved = f"fell by {share(saved)}" if saved >= 0 else f"rose by {share(-saved)}"
    return (
        f"Students answered {share(by_students(after))} of unseen requests: the bill {moved}, "
        f"and {share(after.accuracy)} of all answers were right"
    )


def _headline_of_day(last: Quarter, number: int) -> str:
    saved = last.saved
    bill = f"cost {share(saved.share)} less" if (saved.share or 0.0) >= 0 else f"cost {share(-(saved.share or 0.0))} more"
    waiting = f"the median wait was {waited(last.latency['all'].p50_seconds)} against {waited(last.latency['always-teacher'].p50_seconds)}"
    return (
        f"In quarter {number} of the day the same requests {bill} than the teacher alone ({share(saved.by_students)} saved by students, "
        f"{share(saved.by_cache)} by the cache), at {share(last.quality.ratio)} of its quality; {waiting}"
    )
