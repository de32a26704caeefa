"""Deadlines that one timer looks after: as asyncio's own, but for a few hundredths of a second."""

from __future__ import annotations

import asyncio
import time

import pytest

from tutelage import deadlines
from tutelage.deadlines import LOOK_SECONDS, Deadline


def soon(seconds: float) -> Deadline:
    return Deadline(asyncio.get_running_loop().time() + seconds)


async def waiting(seconds: float) -> asyncio.Task[None]:
    """A task that has begun to wait for longer than it may."""

    async def wait() -> None:
        with soon(seconds):
            await asyncio.sleep(10)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    return task


async def test_what_takes_too_long_is_ended_on_time() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError), soon(0.05):
        await asyncio.sleep(10)
    assert 0.045 <= time.monotonic() - began < 0.5


async def test_one_that_has_passed_already_ends_the_first_wait() -> None:
    with pytest.raises(TimeoutError), soon(-1):
        await asyncio.sleep(10)


async def test_what_ends_in_time_is_left_alone_and_nothing_is_looked_after_any_more() -> None:
    with soon(0.03):
        await asyncio.sleep(0)
    await asyncio.sleep(0.03 + 3 * LOOK_SECONDS)
    assert asyncio.get_running_loop() not in deadlines._all


async def test_an_error_of_the_block_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="mine"), soon(5):
        raise ValueError("mine")


async def test_who_is_cancelled_is_cancelled_and_not_late() -> None:
    task = await waiting(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_and_late_at_once_is_cancelled() -> None:
    task = await waiting(0.01)
    asyncio.get_running_loop().call_soon(time.sleep, 0.02 + LOOK_SECONDS)  # so late that both come in one turn of the loop
    asyncio.get_running_loop().call_later(0.01, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_outer_of_two_ends_what_the_inner_would_allow() -> None:
    reached: list[str] = []

    async def wait() -> None:
        with soon(0.03):
            with soon(5):
                await asyncio.sleep(10)
            reached.append("what follows the inner one")

    with pytest.raises(TimeoutError):
        await wait()
    assert not reached


async def test_two_that_pass_together_are_both_told() -> None:
    at = asyncio.get_running_loop().time() + 0.01
    heard = []

    async def wait() -> None:
        with Deadline(at):
            try:
                with Deadline(at):
                    await asyncio.sleep(10)
            except BaseException as ended:
                heard.append(type(ended))
                raise

    with pytest.raises(TimeoutError):
        await wait()
    assert heard == [asyncio.CancelledError]  # the outer one's: the inner cannot tell both apart, and asyncio's cannot either


async def test_after_it_the_task_can_be_cancelled_as_ever() -> None:
    with pytest.raises(TimeoutError), soon(0.01):
        await asyncio.sleep(10)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_what_the_block_makes_of_being_late_stays_what_it_is() -> None:
    async def wait() -> None:
        with soon(0.01):
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                raise ValueError("mine") from None

    with pytest.raises(ValueError, match="mine"):
        await wait()


async def test_who_is_late_is_told_once_and_may_take_long_to_clean_up() -> None:
    cleaned: list[bool] = []

    async def wait() -> None:
        with soon(0.01):
            try:
                await asyncio.sleep(10)
            finally:
                await asyncio.sleep(3 * LOOK_SECONDS)
                cleaned.append(True)

    with pytest.raises(TimeoutError):
        await wait()
    assert cleaned


async def test_a_thousand_at_once_each_by_its_own_time() -> None:
    async def one(seconds: float) -> bool:
        try:
            with soon(seconds):
                await asyncio.sleep(0.15)
        except TimeoutError:
            return True
        return False

    late = await asyncio.gather(*(one(0.01 if n % 2 else 5) for n in range(1000)))
    assert late == [bool(n % 2) for n in range(1000)]


def test_a_loop_that_ended_with_one_open_is_forgotten() -> None:
    async def open_one() -> None:
        with soon(5):
            await asyncio.sleep(0)

    for _ in range(3):
        asyncio.run(open_one())
    assert sum(loop.is_closed() for loop in deadlines._all) <= 1


def test_without_a_task_it_says_so() -> None:
    loop, heard = asyncio.new_event_loop(), []

    def call() -> None:
        try:
            with Deadline(loop.time()):
                pass
        except RuntimeError as refused:
            heard.append(str(refused))

    loop.call_soon(call)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert heard == ["a deadline is for a task"]
