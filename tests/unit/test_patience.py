"""A deadline that the worker's own lag does not use up."""

from __future__ import annotations

import asyncio
import time

import pytest

from tutelage.gateway.patience import within


async def test_who_does_not_answer_is_given_up_on_time() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with within(0.05):
            await asyncio.sleep(10)
    assert 0.045 <= time.monotonic() - began < 0.5


async def test_a_reply_that_waits_in_a_busy_loop_is_heard() -> None:
    loop = asyncio.get_running_loop()
    reply: asyncio.Future[int] = loop.create_future()

    async def in_turns() -> int:
        """A reply that takes three turns of the loop to be handed over, as one from a socket does."""
        found = await reply
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return found

    loop.call_later(0.01, time.sleep, 0.2)  # the worker is busy with something else for four deadlines
    loop.call_later(0.02, reply.set_result, 42)
    async with within(0.05):
        assert await in_turns() == 42


async def test_a_cancelled_wait_is_cancelled_and_not_timed_out() -> None:
    async def wait() -> None:
        async with within(5):
            await asyncio.sleep(10)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
