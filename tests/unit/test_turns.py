"""Turns: more important first, nobody starved, tenants alike, nothing leaked."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import Overloaded
from tutelage.gateway.turns import HEAD_START, PRIORITIES, Line, Place, Priority, Turns

NOBODY: Counter[str] = Counter()


def place(tenant: str, priority: Priority = "normal", arrived: float = 0.0) -> Place:
    return Place(tenant, priority, arrived, turn=None)  # type: ignore[arg-type]


def order(line: Line, running: Counter[str] = NOBODY) -> list[tuple[str, Priority]]:
    served = []
    while (found := line.next(running)) is not None:
        served.append((found.tenant_id, found.priority))
    return served


def test_high_goes_before_normal_before_low() -> None:
    line = Line(10)
    for priority in reversed(PRIORITIES):
        line.join(place("a", priority))
    assert order(line) == [("a", "high"), ("a", "normal"), ("a", "low")]


def test_one_of_low_priority_that_waited_its_time_goes_before_a_new_high_one() -> None:
    line = Line(10)
    line.join(place("a", "low", arrived=0.0))
    line.join(place("b", "high", arrived=HEAD_START["high"] + 0.1))
    assert order(line) == [("a", "low"), ("b", "high")]


def test_a_tenant_with_many_waiting_takes_turns_with_one_that_has_few() -> None:
    line = Line(20)
    for n in range(6):
        line.join(place("many", arrived=n))
    for n in range(2):
        line.join(place("few", arrived=10 + n))
    assert [tenant for tenant, _ in order(line)][:4].count("few") == 2


def test_a_tenant_that_runs_most_waits_for_one_that_runs_nothing() -> None:
    line = Line(20)
    line.join(place("busy", arrived=0.0))
    line.join(place("idle", arrived=1.0))
    assert order(line, Counter(busy=5))[0] == ("idle", "normal")


def test_a_full_line_sheds_the_lowest_priority_first_and_never_a_higher_one() -> None:
    line = Line(2)
    low, normal = place("a", "low"), place("a", "normal")
    assert [line.join(low), line.join(normal)] == [None, None]
    assert line.join(place("b", "high")) is low
    assert line.join(place("b", "high")) is normal
    late = place("c", "low")
    assert line.join(late) is late
    assert line.size == 2


def test_a_full_line_makes_room_for_a_tenant_with_less_waiting() -> None:
    line = Line(4)
    flood = [place("flood", arrived=n) for n in range(4)]
    for one in flood:
        line.join(one)
    assert line.join(place("quiet")) is flood[-1]
    more = place("flood")
    assert line.join(more) is more


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(PRIORITIES), st.integers(0, 100)), max_size=60),
    st.integers(1, 20),
)
def test_everybody_is_served_or_shed_exactly_once(arrivals: list[tuple[str, Priority, int]], most: int) -> None:
    line, shed = Line(most), []
    places = [place(tenant, priority, float(at)) for tenant, priority, at in arrivals]
    for one in places:
        out = line.join(one)
        if out is not None:
            shed.append(out)
        assert line.size <= most
    served = []
    while (found := line.next(NOBODY)) is not None:
        served.append(found)
    assert sorted(map(id, served + shed)) == sorted(map(id, places))
    assert line.size == 0


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=80))
def test_no_tenant_waits_more_than_one_round_while_another_is_served_twice(tenants: list[str]) -> None:
    line = Line(100)
    for n, tenant in enumerate(tenants):
        line.join(place(tenant, arrived=float(n)))
    left = Counter(tenants)
    served = [tenant for tenant, _ in order(line)]
    for first in range(len(served)):
        window = served[first : first + len(left)]
        assert max(Counter(window).values()) == 1 or len([t for t in left if served[first:].count(t)]) < len(left)


async def hold(turns: Turns, tenant: str, priority: Priority, told: list[Any], seconds: float = 0.01) -> None:
    try:
        async with turns.taken(tenant, priority):
            told.append((tenant, priority))
            await asyncio.sleep(seconds)
    except Overloaded as refused:
        told.append(refused)


async def test_only_so_many_run_at_once_and_the_rest_wait() -> None:
    turns, told = Turns(most_running=3, most_waiting=50, wait_seconds=5), []  # type: ignore[var-annotated]
    tasks = [asyncio.create_task(hold(turns, "a", "normal", told)) for _ in range(20)]
    await asyncio.sleep(0)
    assert (turns.running, turns.waiting) == (3, 17)
    await asyncio.gather(*tasks)
    assert told == [("a", "normal")] * 20
    assert (turns.running, turns.waiting) == (0, 0)


async def test_who_gets_no_turn_in_time_is_told_when_to_come_back() -> None:
    turns, told = Turns(most_running=1, most_waiting=5, wait_seconds=0.05), []  # type: ignore[var-annotated]
    await asyncio.gather(hold(turns, "a", "normal", told, 0.3), hold(turns, "b", "normal", told))
    refused = [one for one in told if isinstance(one, Overloaded)]
    assert [(one.status, one.code) for one in refused] == [(503, "overloaded")]
    assert refused[0].retry_after is not None
    assert refused[0].retry_after >= 1
    assert (turns.running, turns.waiting) == (0, 0)


async def test_a_shed_request_hears_of_it_at_once() -> None:
    turns, told = Turns(most_running=1, most_waiting=1, wait_seconds=60), []  # type: ignore[var-annotated]
    first = asyncio.create_task(hold(turns, "a", "normal", told, 0.2))
    await asyncio.sleep(0)
    low = asyncio.create_task(hold(turns, "a", "low", told))
    await asyncio.sleep(0)
    high = asyncio.create_task(hold(turns, "b", "high", told))
    await asyncio.wait_for(low, 0.1)
    assert isinstance(told[-1], Overloaded)
    await asyncio.gather(first, high)
    assert ("b", "high") in told


async def test_a_client_that_leaves_the_line_takes_no_turn_with_it() -> None:
    turns, told = Turns(most_running=1, most_waiting=5, wait_seconds=60), []  # type: ignore[var-annotated]
    first = asyncio.create_task(hold(turns, "a", "normal", told, 0.05))
    await asyncio.sleep(0)
    leaver = asyncio.create_task(hold(turns, "a", "normal", told))
    stayer = asyncio.create_task(hold(turns, "a", "normal", told))
    await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.gather(first, stayer, leaver, return_exceptions=True)
    assert len(told) == 2
    assert (turns.running, turns.waiting) == (0, 0)


async def test_a_turn_that_comes_while_its_client_leaves_goes_to_the_next() -> None:
    turns, told = Turns(most_running=1, most_waiting=5, wait_seconds=60), []  # type: ignore[var-annotated]
    async with turns.taken("a", "normal"):
        leaver = asyncio.create_task(hold(turns, "a", "normal", told))
        await asyncio.sleep(0)
    leaver.cancel()  # its turn has come, and it has not run yet
    with pytest.raises(asyncio.CancelledError):
        await leaver
    await asyncio.wait_for(hold(turns, "b", "normal", told), 1)
    assert told == [("b", "normal")]
    assert turns.running == 0
