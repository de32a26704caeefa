"""The shared level of the exact cache on a real Valkey: within its bounds a tenant's oldest answers go first, and never another's."""

from __future__ import annotations

import asyncio
import uuid

import valkey.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage.fleet import engines
from tutelage.gateway.cache import Cache, CacheKey, Keeping, cache_key

SECRET = b"s" * 32
BESIDE = 300  # bytes that scripts/keep.lua counts for an entry beside its value
TENANT_BYTES, TOTAL_BYTES = 4_000, 7_000

BATCHES = st.lists(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(20, 4_200)), min_size=1, max_size=8), min_size=1, max_size=5
)


class Plain:
    """The same, one answer after the other: of each tenant, sizes by number in the order they were kept."""

    def __init__(self) -> None:
        self.held: list[dict[int, int]] = [{}, {}]

    def keep(self, tenant: int, number: int, length: int) -> None:
        mine, size = self.held[tenant], length + BESIDE
        mine.pop(number, None)
        if size > TENANT_BYTES:
            return
        while sum(mine.values()) + size > TENANT_BYTES or sum(sum(one.values()) for one in self.held) + size > TOTAL_BYTES:
            if not mine:
                return
            del mine[next(iter(mine))]
        mine[number] = size


def key(tenant: str, number: int) -> CacheKey:
    return cache_key(tenant, {"number": number}, secret=SECRET, policy="p")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=BATCHES)
def test_what_a_batch_keeps_and_drops_is_what_its_answers_do_one_by_one(
    servers: engines.Engines, batches: list[list[tuple[int, int, int]]]
) -> None:
    tenants = [f"ten_{uuid.uuid4().hex[:8]}" for _ in range(2)]

    async def play() -> None:
        cache = Cache(
            servers.valkey_url, secret=SECRET, deadline_seconds=1.0, worker_bytes=10_000, tenant_bytes=TENANT_BYTES, total_bytes=TOTAL_BYTES
        )  # fmt: skip
        client, plain = valkey.asyncio.from_url(servers.valkey_url), Plain()
        await client.delete("tutelage:cached:bytes")
        try:
            for batch in batches:
                for tenant, number, length in batch:
                    plain.keep(tenant, number, length)
                await cache._set([Keeping(key(tenants[tenant], number), b"v" * length, 60) for tenant, number, length in batch])
            for tenant, held in zip(tenants, plain.held, strict=True):
                there = [number for number in range(6) if await client.exists(str(key(tenant, number)))]
                assert there == sorted(held)
                assert int(await client.get(f"tutelage:cached:{tenant}:bytes") or 0) == sum(held.values())
            assert int(await client.get("tutelage:cached:bytes") or 0) == sum(sum(held.values()) for held in plain.held)
        finally:
            for tenant in tenants:
                await cache.clear(tenant)
            await cache.close()
            await client.aclose()

    asyncio.run(play())
