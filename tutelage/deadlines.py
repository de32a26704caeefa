"""Deadlines of what a worker does thousands of times a second: one timer of the event loop looks after all of them, since to start and stop
one for each costs five times as much and more. Otherwise as `asyncio.timeout_at`. It refuses to know what is waited for.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

LOOK_SECONDS = 0.02  # a deadline is kept so late at most


class Deadline:
    """Ends the block in a TimeoutError unless it is left by `at`, in the loop's time (seconds)."""

    __slots__ = ("_cancelling", "_late", "_open", "_task", "at")

    def __init__(self, at: float) -> None:
        self.at, self._late = at, False

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None:
            raise RuntimeError("a deadline is for a task")
        self._task, self._cancelling = task, task.cancelling()
        self._open = _open_of(loop)
        self._open.add(self)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self._open.discard(self)
        # only what this deadline itself cancelled becomes a TimeoutError, as in asyncio.Timeout
        if self._late and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from value

    def expire(self) -> None:
        self._late = True
        self._task.cancel()


_all: dict[asyncio.AbstractEventLoop, set[Deadline]] = {}  # those that are open, of each loop that has any


def _open_of(loop: asyncio.AbstractEventLoop) -> set[Deadline]:
    found = _all.get(loop)
    if found is None:
        for ended in [known for known in _all if known.is_closed()]:
            del _all[ended]
        found = _all[loop] = set()
        loop.call_later(LOOK_SECONDS, _look, loop, found)
    return found


def _look(loop: asyncio.AbstractEventLoop, found: set[Deadline]) -> None:
    now = loop.time()
    for passed in [deadline for deadline in found if deadline.at <= now]:
        found.discard(passed)
        passed.expire()
    if found:
        loop.call_later(LOOK_SECONDS, _look, loop, found)
    else:
        del _all[loop]
