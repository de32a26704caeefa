"""How often and how soon a failed call is tried again, so that trouble upstream never becomes a storm of ours.

Pure rules, told the time (seconds on a monotonic clock) and given chance. It refuses to know what failed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

SHARE = 0.1  # of the calls in the window may be retries
FLOOR = 10  # retries in the window that are always allowed: a quiet model may try again too
WINDOW_SECONDS = 10
MOST_RETRIES = 2  # of one call
FIRST_SECONDS, LONGEST_SECONDS = 0.1, 2.0


@dataclass
class Budget:
    """Counts calls and retries of one model, by the second."""

    seconds: deque[list[int]] = field(default_factory=deque)  # [second, calls, retries]

    def called(self, now: float) -> None:
        self._now(now)[1] += 1

    def take(self, now: float) -> bool:
        """Whether one more retry may be made; it is counted if so."""
        current = self._now(now)
        calls, retries = (sum(second[kind] for second in self.seconds) for kind in (1, 2))
        if retries >= max(FLOOR, SHARE * calls):
            return False
        current[2] += 1
        return True

    def _now(self, now: float) -> list[int]:
        second = int(now)
        while self.seconds and self.seconds[0][0] <= second - WINDOW_SECONDS:
            self.seconds.popleft()
        if not self.seconds or self.seconds[-1][0] != second:
            self.seconds.append([second, 0, 0])
        return self.seconds[-1]


def wait_seconds(retry: int, *, chance: float, asked: float | None) -> float | None:
    """How long to wait before retry number `retry` (from 0): full jitter over a doubling bound, or what the other side `asked` for.
    None when it asked for more than anybody should wait."""
    if asked is not None:
        return asked if asked <= LONGEST_SECONDS else None
    return float(chance * min(LONGEST_SECONDS, FIRST_SECONDS * 2**retry))
