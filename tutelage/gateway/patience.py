"""A deadline for somebody else, which time that this worker was too busy to listen does not use up.

A plain timeout fires as soon as the clock says so, even where the reply has long arrived and waits its turn in a crowded event loop: a
worker under load would then take its own lag for a dead Valkey. It refuses to know what is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

TURNS = 5  # of the event loop: a reply is read, parsed and handed over in three


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Raises TimeoutError when the block takes longer than `seconds`, spread over at least TURNS turns of the event loop."""
    async with asyncio.timeout(None) as deadline:
        patience = _Patience(deadline, seconds / TURNS)
        try:
            yield
        finally:
            patience.timer.cancel()


class _Patience:
    """Ends the deadline after TURNS waits of `seconds` each."""

    def __init__(self, deadline: asyncio.Timeout, seconds: float) -> None:
        self._deadline, self._seconds, self._left = deadline, seconds, TURNS
        self._loop = asyncio.get_running_loop()
        self.timer = self._loop.call_later(seconds, self._tick)

    def _tick(self) -> None:
        self._left -= 1
        if self._left:
            self.timer = self._loop.call_later(self._seconds, self._tick)
        else:
            self._deadline.reschedule(self._loop.time())
