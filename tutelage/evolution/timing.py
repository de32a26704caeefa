"""When a tenant's next evolution cycle is due by itself. A pure rule: what was counted and the clock in, a decision with its reason out.

It refuses to know who counts, and how a cycle is started.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from tutelage.evolution.gaps import EvolveSettings

MOST_DOUBLINGS = 8


@dataclass(frozen=True)
class Seen:
    """What is known of a tenant. `fresh`: interactions since its last finished cycle began, counted no further than the interval;
    `since`: when that was, or when the tenant came; `running`: somebody runs a cycle of it now; `cut_off`: one was begun and nobody
    runs it any more; `failures`: cycles since the last finished one; `ended`: when the newest one ended or was begun (None: no cycle)."""

    fresh: int
    since: datetime
    running: bool = False
    cut_off: bool = False
    failures: int = 0
    ended: datetime | None = None


@dataclass(frozen=True)
class Due:
    due: bool
    reason: str


def due(seen: Seen, settings: EvolveSettings, *, now: datetime) -> Due:
    """Whether a cycle begins now. One that was cut off is begun again at once, the first time; cycles that fail again and again are
    tried after twice the rest each."""
    interval, hours = settings.evolution_interval, settings.schedule_hours
    if interval is None and hours is None:
        return Due(False, "cycles are begun by hand alone (evolve.yaml: evolution_interval, schedule_hours)")
    if seen.running:
        return Due(False, "a cycle is running")
    if seen.cut_off and seen.failures <= 1:
        return Due(True, "the last cycle was cut off")
    rest = timedelta(minutes=settings.rest_minutes) * 2 ** min(max(seen.failures - 1, 0), MOST_DOUBLINGS)
    if seen.ended is not None and now < seen.ended + rest:
        return Due(False, f"the last cycle ended at {seen.ended:%H:%M:%S}; the next is begun from {seen.ended + rest:%H:%M:%S} UTC")
    if seen.cut_off:
        return Due(True, f"the last cycle was cut off, {seen.failures} in a row")
    if interval is not None and seen.fresh >= interval:
        return Due(True, f"{interval} interactions since the last cycle")
    if hours is not None and seen.fresh and now >= seen.since + timedelta(hours=hours):
        return Due(True, f"{hours:g} hours since the last cycle")
    return Due(False, f"{seen.fresh} interactions since the last cycle")
