"""Calls that arrive while another is under way are sent together: one round trip for all of them, and no timer where anybody waits.

It refuses to know what is called; `run` gets a list and returns as many results.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Result = TypeVar("Result")
Waiter = asyncio.Future[Result] | Callable[[Exception], None]


class Batched(Generic[Asked, Result]):
    """`await batched(item)` gives the result of `item`; at most `most` items go in one call, in the order they came. What is only sent
    goes along with the next call, or by itself after `linger_seconds`."""

    def __init__(self, run: Callable[[list[Asked]], Awaitable[Sequence[Result]]], *, most: int = 256, linger_seconds: float = 0.0) -> None:
        self._run = run
        self._most = most
        self._linger = linger_seconds
        self._waiting: deque[tuple[Asked, Waiter[Result]]] = deque()
        self._pressing = 0  # of those that wait, how many somebody waits for
        self._worker: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, item: Asked) -> Result:
        """Raises what the call raised that `item` was in."""
        return await self.begin(item)

    def begin(self, item: Asked) -> asyncio.Future[Result]:
        """As a call, to be waited for later or never."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._pressing += 1
        self._go()
        return future

    def send(self, item: Asked, failed: Callable[[Exception], None], *, linger: bool = True) -> None:
        """As a call whose result nobody waits for; `failed` is told when there is none. Without `linger` it goes at once."""
        self._waiting.append((item, failed))
        if not linger:
            self._go()
        elif self._worker is None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._linger, self._go)

    @property
    def size(self) -> int:
        """How many wait for a call."""
        return len(self._waiting)

    async def join(self) -> None:
        """Wait until everything that was asked for so far has been answered."""
        while self._waiting or self._worker is not None:
            self._go()
            assert self._worker is not None
            await asyncio.shield(self._worker)

    def _go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        try:
            while True:
                await asyncio.sleep(0)  # whoever is ready now goes along
                batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
                self._pressing -= sum(isinstance(waiter, asyncio.Future) for _, waiter in batch)
                await self._answer([(item, waiter) for item, waiter in batch if not _left(waiter)])
                if not self._pressing:
                    return
        finally:
            self._worker = None
            if self._waiting:
                self._timer = asyncio.get_running_loop().call_later(self._linger, self._go)

    async def _answer(self, batch: list[tuple[Asked, Waiter[Result]]]) -> None:
        try:
            results = await self._run([item for item, _ in batch])
        except Exception as failed:  # whatever it was, everyone who waits must hear of it
            for _, waiter in batch:
                if not isinstance(waiter, asyncio.Future):
                    waiter(failed)
                elif not waiter.done():
                    waiter.set_exception(failed)
                    waiter.exception()  # if nobody waits any more, asyncio must not complain
            return
        for (_, waiter), result in zip(batch, results, strict=True):
            if isinstance(waiter, asyncio.Future) and not waiter.done():
                waiter.set_result(result)


def _left(waiter: Waiter[Result]) -> bool:
    return isinstance(waiter, asyncio.Future) and waiter.done()
