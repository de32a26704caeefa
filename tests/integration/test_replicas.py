"""Gateways as processes on the same stores: killed, orphaned, asked to end, told something new, and with a Valkey that fails them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest

from benchmarks import replicas
from benchmarks.crashes import crash
from benchmarks.replicas import Party, Replica, Site, enroll
from tutelage.fleet import engines, processes
from tutelage.stores.database import open_pool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(site: Site) -> Iterator[tuple[Replica, Replica]]:
    """Two replicas with two workers each."""
    with replicas.running(site, replicas=2, workers=2) as (one, other):
        yield one, other


async def join(site: Site, running: tuple[Replica, ...], name: str, **limits: int) -> Party:
    """A tenant whose key all replicas know."""
    party = await enroll(site, name, **limits)
    for replica in running:
        await asyncio.to_thread(replica.wait, key=party.key)
    return party


async def ask(
    session: aiohttp.ClientSession, url: str, party: Party, prompt: str, *, model: str = "mock", **more: Any
) -> tuple[int, str, float]:
    """Status, text and seconds of one chat request."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], **more}
    began = time.monotonic()
    async with session.post(f"{url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {party.key}"}) as response:
        text = await response.text()
        return response.status, text, time.monotonic() - began


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    ends = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < ends:
        time.sleep(0.05)
    return held


# --- killed ------------------------------------------------------------------------------------------------------------


def test_what_was_acknowledged_is_on_the_bill_once_whatever_was_killed(site: Site, upstream: str, pair: tuple[Replica, Replica]) -> None:
    report = asyncio.run(crash(site, pair, upstream, kills=5, clients=12, quota=20, pause=1.0, seed=3, told=lambda: None))
    assert report["broken"] == {}
    assert report["acknowledged"] > 100
    assert sum(report["kills"].values()) == 5
    assert list(report["quotas"].values()) == [[20, 20]], "the quota was not reached: nothing was shown"


def test_workers_whose_first_process_was_killed_end_and_leave_the_port(site: Site) -> None:
    with replicas.running(site, replicas=1, workers=2) as (replica,):
        orphans = replica.workers()
        assert len(orphans) == 2
        replica.kill_first()
        gone = within(8, lambda: not any(o.is_running() and o.status() != psutil.STATUS_ZOMBIE for o in orphans))
        for orphan in orphans:
            with suppress(psutil.Error):
                orphan.kill()
        assert gone
        replica.start()
        replica.wait()
        assert len(replica.workers()) == 2


# --- asked to end ------------------------------------------------------------------------------------------------------


async def test_asked_to_end_a_gateway_finishes_its_streams_or_says_to_try_again_and_takes_no_more(site: Site, upstream: str) -> None:
    site.configure(upstream, drain_seconds=3)
    with replicas.running(site, replicas=1, workers=2, drain_seconds=3) as (replica,):
        party = await join(site, (replica,), "drain")
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            short = [ask(session, replica.url, party, f"chunks-10 {n}", model="mock-p50", stream=True) for n in range(6)]
            long = [ask(session, replica.url, party, f"chunks-500 {n}", model="mock-p50", stream=True) for n in range(6)]
            whole = [ask(session, replica.url, party, f"whole {n}", model="mock-d150") for n in range(6)]
            running = asyncio.gather(*short, *long, *whole)
            await asyncio.sleep(0.1)
            replica.terminate()
            told = await asyncio.wait_for(running, 20)
        assert within(10, lambda: not psutil.pid_exists(replica.pid) or psutil.Process(replica.pid).status() == psutil.STATUS_ZOMBIE)
    assert [status for status, _, _ in told] == [200] * 18
    assert all(text.rstrip().endswith("data: [DONE]") for _, text, _ in told[:6])
    for _, text, _ in told[6:12]:
        assert "[DONE]" not in text
        assert '"code":"server_draining"' in text.splitlines()[-2]
    pool = await open_pool(site.stores.database_url, size=1)
    ends = await pool.fetch("select finish_reason, count(*) from interactions where tenant_id = $1 group by 1", party.tenant_id)
    await pool.close()
    assert dict(map(tuple, ends)) == {"stop": 12, "error": 6}


# --- told something new --------------------------------------------------------------------------------------------------


async def versions(url: str, times: int = 24) -> Counter[str]:
    """What workers say they run on; each answer on a connection of its own."""
    seen: Counter[str] = Counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        for _ in range(times):
            async with session.get(f"{url}/health/ready") as response:
                seen[(await response.json())["configuration"]] += 1
    return seen


async def test_all_workers_of_all_replicas_come_to_the_same_new_configuration(
    site: Site, pair: tuple[Replica, Replica], upstream: str
) -> None:
    for tokens in (55, 77):  # what an earlier test left is not what is looked at
        before = {version for replica in pair for version in await versions(replica.url)}
        site.configure(upstream, reserve_tokens=tokens)
        began = time.monotonic()
        while len(now := {version for replica in pair for version in await versions(replica.url)}) != 1 or now & before:
            assert time.monotonic() - began < 10, f"{before} is still seen: {now}"
    site.configure(upstream, reserve_tokens=-1)  # what cannot be used changes nothing
    await asyncio.sleep(2.5)
    assert {version for replica in pair for version in await versions(replica.url)} == now


# --- many at once -----------------------------------------------------------------------------------------------------------


async def test_more_than_a_thousand_requests_at_once_are_all_answered_and_a_model_that_hangs_stalls_no_other(
    site: Site, pair: tuple[Replica, Replica]
) -> None:
    """vLLM production-stack #448 and #749, through the whole gateway."""
    party = await join(site, pair, "many", concurrent=5000)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        hung = [asyncio.create_task(ask(session, pair[n % 2].url, party, f"hung {n}", model="mock-d60000")) for n in range(300)]
        await asyncio.sleep(1)
        told = await asyncio.gather(*(ask(session, pair[n % 2].url, party, f"many {n}", model="mock-d1000") for n in range(1200)))
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)
        assert Counter(status for status, _, _ in told) == {200: 1200}
        assert (await ask(session, pair[0].url, party, "afterwards"))[0] == 200


# --- a Valkey that fails ---------------------------------------------------------------------------------------------------


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that accepts connections and never answers."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def storm(running: tuple[Replica, ...], party: Party, number: int, *, name: str) -> tuple[Counter[int], list[float]]:
    """`number` requests, 16 at once, over all replicas: how many of each status, and the seconds of those that were answered."""
    gate, statuses, seconds = asyncio.Semaphore(16), Counter[int](), []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:

        async def one(n: int) -> None:
            async with gate:
                status, _, took = await ask(session, running[n % len(running)].url, party, f"{name} {n}")
            statuses[status] += 1
            seconds.append(took)

        await asyncio.gather(*(one(n) for n in range(number)))
    return statuses, seconds


async def test_no_more_run_at_once_than_agreed_over_all_workers(site: Site, pair: tuple[Replica, Replica]) -> None:
    party = await join(site, pair, "crowd", concurrent=7)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        told = await asyncio.gather(*(ask(session, pair[n % 2].url, party, f"crowd {n}", model="mock-d1000") for n in range(40)))
    assert Counter(status for status, _, _ in told) == {200: 7, 429: 33}


async def test_a_slow_a_dead_and_an_emptied_valkey_cost_little_and_grant_no_second_quota(site: Site, upstream: str) -> None:
    """A quota of 2,000 a day. While nobody can count, all workers together let through at most 1 % of it."""
    site.configure(upstream)
    with replicas.running(site, replicas=2, workers=2) as pair:
        party = await join(site, pair, "outage", queries_per_day=2000)
        await asyncio.sleep(6)  # a beat: workers know how many they are
        healthy = Counter[int]()
        for n in range(3):  # a worker that waited too long for Valkey refuses for a moment, on a busy machine also a healthy one
            found, _ = await storm(pair, party, 400, name=f"healthy {n}")
            healthy += found
            if found[200] > 300:
                break
        assert found[200] > 300, "a busy machine may refuse a few; what follows is bounded all the same"
        valkey = processes.find(site.home, "valkey")
        assert valkey is not None
        with stopped(valkey.pid):
            slow, seconds = await storm(pair, party, 200, name="slow")
            assert slow[200] <= 20
            assert slow[200] + slow[429] == 200
            assert np.median(seconds) < 0.06
        await asyncio.sleep(2)
        again, _ = await storm(pair, party, 100, name="again")
        assert again[200] > 50
        valkey.kill()
        valkey.wait(5)
        dead, seconds = await storm(pair, party, 200, name="dead")
        assert slow[200] + dead[200] <= 20, "an outage grants its share once a day"
        assert dead[200] + dead[429] == 200
        assert np.median(seconds) < 0.06
        engines.start_valkey(site.home)  # it kept nothing
        await asyncio.sleep(2)
        answered = healthy[200] + again[200] + slow[200] + dead[200]
        for n in range(6):  # a worker that waited too long for Valkey refuses for a moment
            emptied, _ = await storm(pair, party, max(100, 2000 - answered), name=f"emptied {n}")
            answered += emptied[200]
        assert 1980 <= answered <= 2020
