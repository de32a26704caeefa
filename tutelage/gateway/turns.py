"""Whose turn is it to call a model, when more want to than may: by priority, without starving anybody, fairly between tenants.

`Line` is the rule, told the time; `Turns` lets requests wait by it. It refuses to know what a request asks and what its tenant may use.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from tutelage.errors import Overloaded

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")
# as if it had come this many seconds earlier: one of low priority that has waited ten seconds goes before a new high one
HEAD_START: dict[Priority, float] = {"high": 10.0, "normal": 5.0, "low": 0.0}
MEMORY = 0.9  # of the mean duration of a call: how much of it the next call leaves


@dataclass(eq=False)
class Place:
    """One waiting request; `arrived` in monotonic seconds. `turn` ends its wait: done when it may go, failed when it is shed."""

    tenant_id: str
    priority: Priority
    arrived: float
    turn: asyncio.Future[None] = field(default_factory=asyncio.Future, repr=False)

    @property
    def came(self) -> bool:
        return self.turn.done() and not self.turn.cancelled() and self.turn.exception() is None


class Line:
    """Who waits, in the order of being served. At most `most` wait; a newcomer may push out one that matters less."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[Priority, dict[str, deque[Place]]] = {priority: {} for priority in PRIORITIES}
        self._served: Counter[str] = Counter()  # the number of the last turn each tenant had; only of those that wait
        self._turns = 0
        self.size = 0

    def join(self, place: Place) -> Place | None:
        """Take a place; who is shed for it, the newcomer itself perhaps, when the line is full.

        The newest of the tenant that has most waiting is shed: first of a lower priority, then of the same one if that tenant has
        more waiting than the newcomer's would have.
        """
        shed = None
        if self.size >= self._most:
            shed = self._victim(place) or place
            if shed is place:
                return place
            self.leave(shed)
        self._waiting[place.priority].setdefault(place.tenant_id, deque()).append(place)
        self._served.setdefault(place.tenant_id, self._turns)
        self.size += 1
        return shed

    def leave(self, place: Place) -> None:
        """Give a place up; nothing happens when it was served or shed before."""
        queue = self._waiting[place.priority].get(place.tenant_id)
        if queue is None or place not in queue:
            return
        queue.remove(place)
        self.size -= 1
        if not queue:
            del self._waiting[place.priority][place.tenant_id]
        if not any(place.tenant_id in tenants for tenants in self._waiting.values()):
            del self._served[place.tenant_id]

    def next(self, running: Counter[str]) -> Place | None:
        """Whose turn it is: of the class whose oldest has waited longest, head starts counted, the tenant with the fewest `running`,
        of those the one whose last turn is longest ago, of that its oldest."""
        heads = {
            priority: min(queue[0].arrived for queue in tenants.values()) - HEAD_START[priority]
            for priority, tenants in self._waiting.items()
            if tenants
        }
        if not heads:
            return None
        tenants = self._waiting[min(heads, key=heads.__getitem__)]
        tenant = min(tenants, key=lambda t: (running[t], self._served[t], tenants[t][0].arrived))
        place = tenants[tenant][0]
        self._turns += 1
        self._served[tenant] = self._turns
        self.leave(place)
        return place

    def _victim(self, newcomer: Place) -> Place | None:
        for priority in reversed(PRIORITIES):
            tenants = self._waiting[priority]
            if not tenants:
                if priority == newcomer.priority:
                    return None
                continue
            heaviest = max(tenants, key=lambda t: len(tenants[t]))
            if priority != newcomer.priority:
                return tenants[heaviest][-1]
            return tenants[heaviest][-1] if len(tenants[heaviest]) > len(tenants.get(newcomer.tenant_id, ())) + 1 else None
        return None


class Turns:
    """At most `most_running` calls of models at once in this worker; others wait at most `wait_seconds`, in a `Line`."""

    def __init__(
        self, *, most_running: int, most_waiting: int, wait_seconds: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = most_running
        self._wait = wait_seconds
        self._monotonic = monotonic
        self._line = Line(most_waiting)
        self._running: Counter[str] = Counter()
        self._mean = 1.0  # seconds a call takes
        self.running = 0

    @property
    def waiting(self) -> int:
        return self._line.size

    def change(self, *, most_running: int, wait_seconds: float) -> None:
        """Other bounds from now on; what runs goes on."""
        self._most, self._wait = most_running, wait_seconds
        self._go()

    async def take(self, tenant_id: str, priority: Priority) -> float:
        """Wait for a turn, to be held until `end`; when it began. Raises Overloaded when there is none in time or others matter more."""
        if self.running < self._most and not self._line.size:
            self._begin(tenant_id)
        else:
            await self._queue(tenant_id, priority)
        return self._monotonic()

    def end(self, tenant_id: str, started: float) -> None:
        self._mean = MEMORY * self._mean + (1 - MEMORY) * (self._monotonic() - started)
        self._end(tenant_id)

    @asynccontextmanager
    async def taken(self, tenant_id: str, priority: Priority) -> AsyncIterator[None]:
        """Hold a turn while the body runs. Raises as `take`."""
        started = await self.take(tenant_id, priority)
        try:
            yield
        finally:
            self.end(tenant_id, started)

    def _begin(self, tenant_id: str) -> None:
        self.running += 1
        self._running[tenant_id] += 1

    async def _queue(self, tenant_id: str, priority: Priority) -> None:
        place = Place(tenant_id, priority, self._monotonic())
        shed = self._line.join(place)
        if shed is not None and not shed.turn.done():
            shed.turn.set_exception(self._overloaded(f"too many requests wait, and those of priority {shed.priority!r} go first"))
        try:
            async with asyncio.timeout(self._wait):
                await place.turn
        except BaseException as failed:
            if place.came:  # while the client left or the time ran out: the next one has it
                self._end(tenant_id)
            if isinstance(failed, TimeoutError):
                raise self._overloaded(f"no turn came within {self._wait:g} seconds") from None
            raise
        finally:
            self._line.leave(place)

    def _end(self, tenant_id: str) -> None:
        self.running -= 1
        self._running[tenant_id] -= 1
        if not self._running[tenant_id]:
            del self._running[tenant_id]
        self._go()

    def _go(self) -> None:
        """Give free turns to those whose turn it is."""
        while self.running < self._most and (place := self._line.next(self._running)) is not None:
            if not place.turn.done():
                self._begin(place.tenant_id)
                place.turn.set_result(None)

    def _overloaded(self, why: str) -> Overloaded:
        seconds = min(30, max(1, math.ceil(self._mean * (1 + self._line.size) / self._most)))
        return Overloaded(f"the gateway is overloaded: {why}; try again in {seconds} s", retry_after=seconds)
