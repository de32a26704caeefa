"""Calls that go together: whoever waits is never put off, and what nobody waits for goes along."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from tutelage.gateway.batching import Batched


class Far:
    """Somewhere far away that takes its time, and keeps what came together."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.broken = False

    async def __call__(self, items: Sequence[int]) -> list[int]:
        self.calls.append(list(items))
        await asyncio.sleep(0.01)
        if self.broken:
            raise OSError("gone")
        return [10 * item for item in items]


def refuse(failed: Exception) -> None:
    raise AssertionError(f"nothing was to fail: {failed!r}")


async def test_calls_that_come_while_another_is_under_way_go_together() -> None:
    far = Far()
    batched = Batched(far)
    first = batched.begin(1)
    await asyncio.sleep(0.005)
    assert await asyncio.gather(first, batched(2), batched(3)) == [10, 20, 30]
    assert far.calls == [[1], [2, 3]]


async def test_what_is_only_sent_goes_along_with_the_next_call_and_before_it() -> None:
    far = Far()
    batched = Batched(far, linger_seconds=60)
    batched.send(1, refuse)
    assert await batched(2) == 20
    assert far.calls == [[1, 2]]


async def test_what_is_only_sent_goes_by_itself_when_no_call_comes() -> None:
    far = Far()
    batched = Batched(far, linger_seconds=0.01)
    batched.send(1, refuse)
    await asyncio.sleep(0.1)
    assert far.calls == [[1]]


async def test_what_may_not_linger_goes_at_once() -> None:
    far = Far()
    batched = Batched(far, linger_seconds=60)
    batched.send(1, refuse, linger=False)
    await asyncio.sleep(0.005)
    assert far.calls == [[1]]


async def test_what_is_sent_while_a_call_is_under_way_is_not_forgotten() -> None:
    far = Far()
    batched = Batched(far, linger_seconds=0.01)
    call = batched.begin(1)
    await asyncio.sleep(0.005)
    batched.send(2, refuse)
    await call
    await asyncio.sleep(0.1)
    assert far.calls == [[1], [2]]


async def test_joining_waits_for_what_lingers() -> None:
    far = Far()
    batched = Batched(far, linger_seconds=60)
    batched.send(1, refuse)
    await batched.join()
    assert far.calls == [[1]]


async def test_a_call_that_fails_is_told_to_all_who_were_in_it_and_the_next_is_made() -> None:
    far, told = Far(), list[Exception]()
    far.broken = True
    batched = Batched(far, linger_seconds=60)
    batched.send(1, told.append)
    with pytest.raises(OSError, match="gone"):
        await batched(2)
    assert len(told) == 1
    far.broken = False
    assert await batched(3) == 30


async def test_a_call_nobody_waits_for_any_more_is_not_made() -> None:
    far = Far()
    batched = Batched(far)
    batched.begin(1).cancel()
    assert await batched(2) == 20
    assert far.calls == [[2]]
