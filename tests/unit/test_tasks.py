"""A background task that swallows a cancellation is ended all the same."""

from __future__ import annotations

import asyncio

from tutelage.tasks import end


async def test_a_task_ends_though_a_call_swallows_the_first_cancellation() -> None:
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed > 1:
                    raise

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await asyncio.wait_for(end(task), 5)
    assert task.cancelled()
    assert swallowed == 2


async def test_nothing_and_what_has_ended_need_no_ending() -> None:
    task = asyncio.create_task(asyncio.sleep(0))
    await task
    await end(task)
    await end(None)
    assert task.done()
    assert not task.cancelled()
