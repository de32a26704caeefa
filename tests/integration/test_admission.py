"""Limits on a real Valkey: all workers count together, a refused request uses up nothing, and an outage stays inside its bound."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
import valkey.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage.errors import LimitReached
from tutelage.fleet import engines
from tutelage.gateway.admission import Admission, Call, Estimate, Lost, Meter, Party, Used
from tutelage.gateway.limits import Limits

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
NOTHING = Estimate(0, 0)


class Ledger:
    """What was recorded, as the database would say it."""

    def __init__(self) -> None:
        self.queries = self.cost = self.asked = 0
        self.lost: list[Lost] = []

    async def used(self, _party: Party, _now: datetime) -> Used:
        self.asked += 1
        return Used(self.queries, self.cost)

    async def settle(self, lost: Lost) -> Estimate:
        self.lost.append(lost)
        return lost.reserved


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def workers(servers: engines.Engines, ledger: Ledger) -> AsyncIterator[list[Admission]]:
    """Three gateway workers on one Valkey."""
    made = [build(servers.valkey_url, ledger) for _ in range(3)]
    yield made
    for admission in made:
        await admission.close()


def build(url: str, ledger: Ledger, **changes: Any) -> Admission:
    options: dict[str, Any] = {"deadline_seconds": 1.0, "slot_seconds": 60, "clock": lambda: NOW}
    return Admission(url, used=ledger.used, lost=ledger.settle, **(options | changes))


def party(**limits: int) -> Party:
    tenant = f"ten_{uuid.uuid4().hex[:8]}"
    return Party("tenant", tenant, tenant, Limits(**limits))


async def answer(admission: Admission, who: Party, *, reserve: Estimate = NOTHING, take: Estimate | None = NOTHING) -> str:
    """One request that is answered at once: "answered", or the code of the limit that forbade it."""
    try:
        async with admission.granted(uuid.uuid4().hex, (who,), reserve) as meter:
            if take is not None:
                meter.settle(tokens=take.tokens, cost_microusd=take.cost_microusd)
    except LimitReached as reached:
        return reached.code
    return "answered"


async def test_concurrency_is_exact_across_workers_and_an_ended_request_makes_room(workers: list[Admission]) -> None:
    who, most, running = party(concurrent=4), 0, 0

    async def hold(admission: Admission) -> str:
        nonlocal most, running
        try:
            async with admission.granted(uuid.uuid4().hex, (who,), NOTHING):
                running += 1
                most = max(most, running)
                await asyncio.sleep(0.1)
                running -= 1
        except LimitReached as reached:
            return reached.code
        return "answered"

    told = await asyncio.gather(*(hold(workers[n % 3]) for n in range(30)))
    assert most == 4
    assert sorted(told) == ["answered"] * 4 + ["concurrency_limit"] * 26
    assert await answer(workers[0], who) == "answered"


async def test_a_days_queries_are_exact_across_workers_and_a_failed_request_is_no_query(workers: list[Admission]) -> None:
    who = party(queries_per_day=20)
    assert await answer(workers[0], who, take=None) == "answered"
    told = await asyncio.gather(*(answer(workers[n % 3], who) for n in range(50)))
    assert told.count("answered") == 20
    assert told.count("daily_quota_exceeded") == 30


async def test_a_refused_request_says_when_to_come_back_and_uses_up_nothing(workers: list[Admission]) -> None:
    who = party(queries_per_day=5, requests_per_minute=2)
    assert [await answer(workers[0], who) for _ in range(3)] == ["answered", "answered", "rate_limit_exceeded"]
    with pytest.raises(LimitReached) as refused:
        async with workers[1].granted("r", (who,), NOTHING):
            pass
    assert 20 <= (refused.value.retry_after or 0) <= 30  # two a minute: half a minute for one more
    client = await _client(workers[0])
    assert await client.get(f"{who.head}:day:20260601") == b"2"


async def test_spend_is_reserved_before_and_settled_after(workers: list[Admission]) -> None:
    who = party(spend_per_month_microusd=100)
    async with workers[0].granted("r1", (who,), Estimate(0, 70)) as first:
        assert await answer(workers[1], who, reserve=Estimate(0, 40)) == "spend_limit_reached"
        first.settle(tokens=0, cost_microusd=10)
    assert await answer(workers[1], who, reserve=Estimate(0, 40), take=Estimate(0, 90)) == "answered"
    assert await answer(workers[2], who, reserve=Estimate(0, 1)) == "spend_limit_reached"


async def test_tokens_a_minute_are_charged_by_what_was_really_used(workers: list[Admission]) -> None:
    who = party(tokens_per_minute=1000)
    assert await answer(workers[0], who, reserve=Estimate(900, 0), take=Estimate(100, 0)) == "answered"
    assert await answer(workers[1], who, reserve=Estimate(800, 0), take=Estimate(800, 0)) == "answered"
    assert await answer(workers[2], who, reserve=Estimate(800, 0)) == "token_rate_exceeded"


async def test_a_key_has_its_own_limit_within_its_tenants(workers: list[Admission]) -> None:
    tenant = party(queries_per_day=5)
    small, large = (Party("key", tenant.id, f"k{n}", Limits(queries_per_day=n)) for n in (2, 9))
    told: dict[str, list[str]] = {"small": [], "large": []}
    for name, key, times in (("small", small, 3), ("large", large, 4)):
        for _ in range(times):
            try:
                async with workers[0].granted(uuid.uuid4().hex, (tenant, key), NOTHING) as meter:
                    meter.settle(tokens=0, cost_microusd=0)
                told[name].append("answered")
            except LimitReached as reached:
                told[name].append(reached.message.partition(":")[0])
    assert told["small"] == ["answered", "answered", "limit of this key"]
    assert told["large"] == ["answered"] * 3 + ["limit of this tenant"]


class OneByOne:
    """Limits of a tenant and its keys, plainly: what a batch must come to, one request after the other."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[Party, ...]] = {}
        self.slots: dict[str, set[str]] = {}
        self.queries: dict[str, int] = {}
        self.cost: dict[str, int] = {}

    def admit(self, name: str, parties: tuple[Party, ...], cost: int) -> tuple[str, int]:
        for place, who in enumerate(parties):
            limits = who.limits
            if limits.concurrent is not None and len(self.slots.get(who.head, ())) >= limits.concurrent:
                return "concurrent", place
            if limits.queries_per_day is not None and self.queries.get(who.head, 0) >= limits.queries_per_day:
                return "queries_per_day", place
            if limits.spend_per_month_microusd is not None and self.cost.get(who.head, 0) + cost > limits.spend_per_month_microusd:
                return "spend_per_month_microusd", place
        self.running[name] = parties
        for who in parties:
            self.slots.setdefault(who.head, set()).add(name)
            self.queries[who.head] = self.queries.get(who.head, 0) + 1
            self.cost[who.head] = self.cost.get(who.head, 0) + cost
        return "none", 0

    def end(self, name: str, queries: int, cost: int) -> tuple[str, int]:
        if name not in self.running:
            return "gone", 0
        for who in self.running.pop(name):
            self.slots[who.head].discard(name)
            self.queries[who.head] -= queries
            self.cost[who.head] -= cost
        return "none", 0


BATCHES = st.lists(
    st.lists(
        st.one_of(
            st.tuples(st.just("admit"), st.integers(0, 2), st.integers(0, 40)),
            st.tuples(st.just("end"), st.integers(0, 30), st.integers(0, 1), st.integers(-5, 20)),
        ),
        min_size=1,
        max_size=12,
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=BATCHES)
def test_a_batch_comes_to_what_its_requests_come_to_one_by_one(servers: engines.Engines, ledger: Ledger, batches: list[list[Any]]) -> None:
    """Whatever goes in one call: ends first, then who asks, in order; nothing is taken by one that is refused."""
    tenant = party(concurrent=6, queries_per_day=8, spend_per_month_microusd=150)
    keys = [Party("key", tenant.id, "few", Limits(concurrent=2)), Party("key", tenant.id, "poor", Limits(spend_per_month_microusd=90))]
    groups = [(tenant,), *((tenant, key) for key in keys)]

    async def play() -> None:
        admission, plain = build(servers.valkey_url, ledger), OneByOne()
        client = await _client(admission)
        for who in (tenant, *keys):
            await admission._set(f"{who.head}:day:20260601", 0, f"{who.head}:month:202606", 0)
        asked: list[tuple[str, tuple[Party, ...]]] = []
        try:
            for batch in batches:
                calls, expected = [], []
                for _, which, queries, cost in [one for one in batch if one[0] == "end" and one[1] < len(asked)]:
                    name, parties = asked[which]
                    calls.append(Call("end", Meter(name, parties, NOW, NOTHING).standing, name, (queries, 0, cost)))
                    expected.append(plain.end(name, queries, cost))
                for _, group, cost in [one for one in batch if one[0] == "admit"]:
                    asked.append((name := uuid.uuid4().hex, parties := groups[group]))
                    values = (60_000, 0, cost, tenant.id, "a key", NOW.isoformat())
                    calls.append(Call("admit", Meter(name, parties, NOW, NOTHING).standing, name, values))
                    expected.append(plain.admit(name, parties, cost))
                assert [(limit, place) for limit, place, _ in await admission._decide(calls)] == expected
            for who in (tenant, keys[0]):
                assert {name.decode() for name in await client.zrange(f"{who.head}:slots", 0, -1)} == plain.slots.get(who.head, set())
            for who in (tenant, keys[1]):
                assert int(await client.get(f"{who.head}:month:202606")) == plain.cost.get(who.head, 0)
            assert int(await client.get(f"{tenant.head}:day:20260601")) == plain.queries.get(tenant.head, 0)
        finally:
            await admission.close()

    asyncio.run(play())


async def test_an_emptied_valkey_grants_no_second_quota(workers: list[Admission], ledger: Ledger) -> None:
    who = party(queries_per_day=10)
    assert [await answer(workers[0], who) for _ in range(8)] == ["answered"] * 8
    ledger.queries = 8
    client = await _client(workers[0])
    await client.delete(f"{who.head}:day:20260601", f"{who.head}:month:202606")
    told = await asyncio.gather(*(answer(workers[n % 3], who) for n in range(9)))
    assert told.count("answered") == 2
    assert ledger.asked >= 2


async def test_a_dead_valkey_leaves_each_worker_its_part_of_a_hundredth(ledger: Ledger) -> None:
    admission = build("redis://127.0.0.1:9", ledger, pause_seconds=60)
    who = party(queries_per_day=500)
    told = [await answer(admission, who) for _ in range(9)]
    assert told == ["answered"] * 5 + ["daily_quota_exceeded"] * 4
    assert admission.degraded
    await admission.close()


async def test_a_valkey_that_accepts_and_never_answers_is_waited_for_once_not_by_every_request(ledger: Ledger) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        admission = build(f"redis://127.0.0.1:{listening.getsockname()[1]}", ledger, deadline_seconds=0.05, pause_seconds=60)
        waited: list[float] = []
        for _ in range(20):
            loop = asyncio.get_running_loop()
            started = loop.time()
            assert await answer(admission, party(queries_per_day=1000)) == "answered"
            waited.append(loop.time() - started)
        assert sum(seconds >= 0.05 for seconds in waited) == 1
        await admission.close()


async def test_a_valkey_that_comes_and_goes_grants_the_outage_share_once_a_day(ledger: Ledger, servers: engines.Engines) -> None:
    admission, who = build(servers.valkey_url, ledger, pause_seconds=60), party(queries_per_day=500)
    told = []
    for _ in range(3):
        admission._down_until = float("inf")
        told += [await answer(admission, who) for _ in range(4)]
        admission._down_until = 0.0
        assert await answer(admission, who) == "answered"
    assert told.count("answered") == 5
    await admission.close()


async def test_a_worker_that_missed_beats_during_an_outage_is_not_taken_for_dead(servers: engines.Engines, ledger: Ledger) -> None:
    who = party(concurrent=1)
    first, second = (build(servers.valkey_url, ledger, beat_seconds=0.2) for _ in range(2))
    await first._report()
    await second._report()
    await second.grant(Meter("r1", (who,), NOW, NOTHING))
    client = await _client(first)
    await client.delete(f"tutelage:worker:{second._worker}:alive")  # nobody could beat for a while
    await first._report()
    await second._report()
    for _ in range(4):
        await first._report()
    assert ledger.lost == []
    assert await answer(first, who) == "concurrency_limit"
    for admission in (first, second):
        await admission.close()


async def test_what_valkey_granted_without_our_hearing_of_it_is_given_back(servers: engines.Engines, ledger: Ledger) -> None:
    who, admission = party(concurrent=1, spend_per_month_microusd=100), build(servers.valkey_url, ledger)
    assert await answer(admission, who) == "answered"
    heard = admission._ask

    async def unheard(meter: Meter) -> tuple[str, Party, int]:
        await heard(meter)
        raise TimeoutError

    admission._ask = unheard  # type: ignore[method-assign]
    assert await answer(admission, who, reserve=Estimate(0, 90), take=Estimate(0, 5)) == "answered"
    admission._ask, admission._down_until = heard, 0.0  # type: ignore[method-assign]
    assert await answer(admission, who) == "concurrency_limit"
    await admission._report()
    assert await answer(admission, who, reserve=Estimate(0, 95), take=Estimate(0, 0)) == "answered"
    await admission.close()


async def test_a_slot_of_a_worker_that_died_ends_by_itself(servers: engines.Engines, ledger: Ledger) -> None:
    who = party(concurrent=1)
    dead, live = build(servers.valkey_url, ledger, slot_seconds=0.2), build(servers.valkey_url, ledger)
    await dead.grant(Meter("r1", (who,), NOW, NOTHING))  # it is never given back
    assert await answer(live, who) == "concurrency_limit"
    await asyncio.sleep(0.3)
    assert await answer(live, who) == "answered"
    for admission in (dead, live):
        with contextlib.suppress(OSError):
            await admission.close()


async def test_what_a_dead_worker_left_running_is_billed_once_at_its_reservation_and_its_slot_is_free(
    servers: engines.Engines, ledger: Ledger
) -> None:
    who = party(concurrent=1, spend_per_month_microusd=100)
    dead, *living = (build(servers.valkey_url, ledger, beat_seconds=0.1) for _ in range(3))
    await dead._report()  # one beat; then its process is gone and gives nothing back
    for admission in living:
        await admission.start()
    await dead.grant(Meter("r1", (who,), NOW, Estimate(7, 40)))
    assert await answer(living[0], who) == "concurrency_limit"
    for _ in range(100):
        await asyncio.sleep(0.1)
        if ledger.lost:
            break
    await asyncio.sleep(0.3)  # the other one may not bill it again
    assert [(lost.request_id, lost.tenant_id, lost.reserved) for lost in ledger.lost] == [("r1", who.id, Estimate(7, 40))]
    assert await answer(living[1], who, reserve=Estimate(0, 61)) == "spend_limit_reached"
    assert await answer(living[1], who, reserve=Estimate(0, 60)) == "answered"
    for admission in (dead, *living):
        await admission.close()


async def test_a_worker_that_dies_before_its_first_beat_is_found_and_settled(servers: engines.Engines, ledger: Ledger) -> None:
    who = party(concurrent=1)
    dead, living = (build(servers.valkey_url, ledger, beat_seconds=0.1) for _ in range(2))
    await dead.grant(Meter("r1", (who,), NOW, Estimate(7, 40)))
    await living.start()
    for _ in range(100):
        await asyncio.sleep(0.1)
        if any(lost.request_id == "r1" and lost.tenant_id == who.id for lost in ledger.lost):
            break
    else:
        raise AssertionError("nobody settled it")
    assert await answer(living, who) == "answered"
    for admission in (dead, living):
        await admission.close()


async def test_a_dead_worker_is_settled_in_time_though_none_of_the_living_lives_long(servers: engines.Engines, ledger: Ledger) -> None:
    who, dead = party(), build(servers.valkey_url, ledger, beat_seconds=0.2)
    await dead.grant(Meter("r1", (who,), NOW, Estimate(7, 40)))
    began = asyncio.get_running_loop().time()
    while not any(lost.tenant_id == who.id for lost in ledger.lost):
        assert asyncio.get_running_loop().time() - began < 12 * 0.2 + 3, "nobody settled it"
        shortlived = build(servers.valkey_url, ledger, beat_seconds=0.2)
        await shortlived._report()  # one beat each
        await shortlived.close()
        await asyncio.sleep(0.05)
    await dead.close()


async def test_what_cannot_be_settled_of_one_dead_worker_keeps_no_other_from_it(servers: engines.Engines, ledger: Ledger) -> None:
    stuck, who = party(), party()
    dead = [build(servers.valkey_url, ledger, beat_seconds=0.1) for _ in range(6)]

    async def settle(lost: Lost) -> Estimate:
        if lost.tenant_id == stuck.id:
            raise LookupError("its tenant is gone")
        return await ledger.settle(lost)

    living = Admission(servers.valkey_url, used=ledger.used, lost=settle, deadline_seconds=1.0, slot_seconds=60, beat_seconds=0.1)
    for n, admission in enumerate(dead):
        await admission.grant(Meter(f"r{n}", (who if n % 2 else stuck,), NOW, Estimate(7, 40)))
    await living.start()
    for _ in range(100):
        await asyncio.sleep(0.1)
        if len([lost for lost in ledger.lost if lost.tenant_id == who.id]) == 3:
            break
    assert sorted(lost.request_id for lost in ledger.lost if lost.tenant_id == who.id) == ["r1", "r3", "r5"]
    client = await _client(living)
    for admission in dead:
        await client.delete(f"tutelage:worker:{admission._worker}:running")
    for admission in (*dead, living):
        await admission.close()


async def test_every_worker_knows_how_many_share_the_limits(servers: engines.Engines, ledger: Ledger) -> None:
    admissions = [build(servers.valkey_url, ledger, beat_seconds=0.1) for _ in range(3)]
    for admission in admissions:
        await admission.start()
    await asyncio.sleep(1.0)
    assert [admission.workers for admission in admissions] == [3, 3, 3]
    for admission in admissions[1:]:
        await admission.close()
    await asyncio.sleep(0.5)
    assert admissions[0].workers == 1
    await admissions[0].close()


async def _client(admission: Admission) -> valkey.asyncio.Valkey:
    client: valkey.asyncio.Valkey = admission._client
    return client
