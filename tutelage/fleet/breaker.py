"""May this replica be called now? A circuit breaker: a replica that fails is left alone for a while, then probed by one call.

A pure rule, told the time (seconds on a monotonic clock). It refuses to know what a call is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

RUN = 5  # failures in a row
WINDOW_SECONDS = 30.0
WINDOW_CALLS, WINDOW_SHARE = 20, 0.5  # or this share of so many calls within the window
OPEN_SECONDS, LONGEST_SECONDS = 5.0, 60.0

State = Literal["closed", "open", "half-open", "resting"]


@dataclass
class Breaker:
    """`resting`: the replica itself asked to be left alone (HTTP 429) and nothing is wrong with it."""

    failures: int = 0  # in a row
    ejections: int = 0
    open_until: float = 0.0
    rest_until: float = 0.0
    open_seconds: float = OPEN_SECONDS
    opened: bool = False
    probing: bool = False
    outcomes: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=1000))

    def state(self, now: float) -> State:
        if self.opened:
            return "open" if now < self.open_until else "half-open"
        return "resting" if now < self.rest_until else "closed"

    def until(self, now: float) -> float:
        """Seconds until it may be called again; 0 when it may."""
        return max(0.0, (self.open_until if self.opened else self.rest_until) - now)

    def admits(self, now: float) -> bool:
        """Whether a call may begin. A half-open breaker admits one at a time: whoever asks and is admitted must report how it went."""
        state = self.state(now)
        if state == "half-open" and not self.probing:
            self.probing = True
            return True
        return state == "closed"

    def succeeded(self, now: float) -> None:
        if self.opened:
            self.outcomes.clear()
        self.failures, self.opened, self.probing, self.open_seconds = 0, False, False, OPEN_SECONDS
        self.outcomes.append((now, True))

    def failed(self, now: float) -> None:
        self.failures += 1
        self.outcomes.append((now, False))
        if self.opened:  # the probe failed
            self.open_seconds = min(LONGEST_SECONDS, 2 * self.open_seconds)
            self._open(now)
        elif self.failures >= RUN or self._failing(now):
            self._open(now)

    def left(self) -> None:
        """A call ended without telling anything of the replica: its caller went away, or asked for what nobody answers."""
        self.probing = False

    def rest(self, now: float, seconds: float) -> None:
        self.probing = False
        self.rest_until = max(self.rest_until, now + min(seconds, LONGEST_SECONDS))

    def _open(self, now: float) -> None:
        self.opened, self.probing = True, False
        self.ejections += 1
        self.open_until = now + self.open_seconds

    def _failing(self, now: float) -> bool:
        while self.outcomes and self.outcomes[0][0] < now - WINDOW_SECONDS:
            self.outcomes.popleft()
        failed = sum(not ok for _, ok in self.outcomes)
        return len(self.outcomes) >= WINDOW_CALLS and failed >= WINDOW_SHARE * len(self.outcomes)
