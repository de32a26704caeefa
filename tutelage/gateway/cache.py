"""Answers that were given before, of each tenant by itself: a first level in the worker, a second in Valkey for all workers.

The tenant is part of the key's type, so no code path can look up another tenant's answer. An entry knows which version of which model gave
it, and is an answer only while that one still serves. A slow or dead Valkey is a miss, never an error. It refuses to know what is worth
keeping (`freshness.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections import Counter
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson
from cachetools import LRUCache
from valkey.exceptions import ValkeyError

from tutelage.gateway.batching import Batched
from tutelage.gateway.patience import within
from tutelage.records import Tier
from tutelage.stores import counters

log = logging.getLogger(__name__)

SCRIPT = Path(__file__).parent / "scripts" / "keep.lua"
MAC_BYTES = 16
HELD_BYTES = 400  # that an entry in the worker takes beside its value: its key, and its places in the order
MOST_WAITING = 2_000  # to be kept in Valkey: a slow one must not fill the worker
KEEP_SECONDS = 0.02  # answers kept within so long go to Valkey together: nobody waits for it
PAUSE_SECONDS = 1.0  # Valkey is not asked again for so long after it did not answer
FAULTS = (TimeoutError, ValkeyError, OSError)

Found = Literal["exact", "stale", "miss"]


class CacheKey(NamedTuple):
    """Whose answer to what, under which policy: the digest is keyed by a secret, so a key tells nothing of the prompt."""

    tenant_id: str
    digest: str

    def __str__(self) -> str:
        return f"tutelage:exact:{self.tenant_id}:{self.digest}"


class Entry(NamedTuple):
    """A whole answer. `lineage` names the model and version that gave it; `expires_at` is in Unix seconds. `standard`: the highest
    threshold under which it would have been given."""

    body: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    model: str
    tier: Tier
    confidence: float | None
    domain: str | None
    lineage: str
    expires_at: float
    question: str | None = None  # what was asked, where paraphrases of it may get this answer, and a digest of all else in the request
    context: str = ""
    standard: float = 0.0


class Servable(NamedTuple):
    """What may be given again: answers of these configured models, and of these versions of the tenant's students, that meet the threshold
    there is now."""

    models: Container[str]
    students: Container[str]
    threshold: float


Looking = asyncio.Future[Entry | None]  # a look into Valkey that is under way


class Keeping(NamedTuple):
    """One entry on its way to Valkey."""

    key: CacheKey
    value: bytes
    seconds: int


def cache_key(tenant_id: str, shape: dict[str, Any], *, secret: bytes, policy: str) -> CacheKey:
    """`shape` is everything in the request that shapes the answer, `policy` how it is routed."""
    material = orjson.dumps([tenant_id, policy, shape], option=orjson.OPT_SORT_KEYS)
    return CacheKey(tenant_id, hashlib.blake2b(material, key=secret[:64], digest_size=32).hexdigest())


class Cache:
    """Both levels. `statistics` counts by tenant what look-ups found and what was kept."""

    def __init__(
        self,
        url: str,
        *,
        secret: bytes,
        deadline_seconds: float,
        worker_bytes: int,
        tenant_bytes: int,
        total_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = counters.connect(url, connect_seconds=deadline_seconds)
        self._script = self._client.register_script(SCRIPT.read_text())
        self._secret = hashlib.blake2b(secret, digest_size=32, person=b"cache").digest()
        self._deadline = deadline_seconds
        self._bounds = (tenant_bytes, total_bytes)
        self._clock = clock
        # as bytes: what an entry is made of takes three times as much memory, and nobody can change what another will get
        self._near: LRUCache[CacheKey, bytes] = LRUCache(worker_bytes, getsizeof=lambda held: len(held) + HELD_BYTES)
        self._looks: Batched[CacheKey, Entry | None] = Batched(self._get)
        self._keeps: Batched[Keeping, None] = Batched(self._set, linger_seconds=KEEP_SECONDS)
        self._down_until = 0.0
        self.statistics: dict[str, Counter[str]] = {}

    def begin(self, key: CacheKey) -> Looking | None:
        """Ask Valkey already, for a `find` that comes soon; nothing where there is no need to."""
        return None if key in self._near or self._down else self._looks.begin(key)

    async def find(self, key: CacheKey, *, servable: Servable, counted: bool = True, looking: Looking | None = None) -> Entry | None:
        """The entry, if it is `servable`; one whose model is no longer live is forgotten. `looking`: what `begin` gave."""
        held = self._near.get(key)
        entry = Entry(*orjson.loads(held)) if held else await self._far(key, looking)
        found = self._told(entry, servable)
        if found == "stale":
            self._near.pop(key, None)
        if counted:
            self._count(key, found)
        return entry if found == "exact" else None

    def _told(self, entry: Entry | None, servable: Servable) -> Found:
        if entry is None or entry.expires_at <= self._clock():
            return "miss"
        if entry.lineage not in servable.models and entry.lineage not in servable.students:
            return "stale"
        return "exact" if entry.standard >= servable.threshold else "miss"  # a threshold that was raised may fall again

    async def kept_since(self, tenant_id: str, since: float, *, most: int) -> list[tuple[CacheKey, Entry, float]]:
        """What any worker kept of a tenant in Valkey after `since` (microseconds by Valkey's clock): the newest `most`, oldest first, each
        with its time. Nothing while Valkey is down."""
        if self._down:
            return []
        try:
            async with asyncio.timeout(10 * self._deadline):  # nobody waits for it
                order = f"tutelage:cached:{tenant_id}:order"
                named = (
                    await self._client.zrange(order, "+inf", f"({since}", desc=True, byscore=True, offset=0, num=most, withscores=True)
                )[::-1]
                values = await self._client.mget([name for name, _ in named]) if named else []
        except FAULTS as failed:
            self._unkept(failed)
            return []
        head = str(CacheKey(tenant_id, ""))
        keys = [CacheKey(tenant_id, name.decode().removeprefix(head)) for name, _ in named]
        entries = [None if value is None else self._read(key, value) for key, value in zip(keys, values, strict=True)]
        return [(key, entry, at) for key, entry, (_, at) in zip(keys, entries, named, strict=True) if entry is not None]

    def keep(self, key: CacheKey, entry: Entry) -> None:
        """Keep it in this worker now and in Valkey soon; nobody waits."""
        value = orjson.dumps([*entry])
        self._hold(key, value)
        self._count(key, "kept")
        if not self._down and self._keeps.size < MOST_WAITING:
            seconds = max(1, round(entry.expires_at - self._clock()))
            self._keeps.send(Keeping(key, self._mac(key, value) + value, seconds), self._unkept)

    async def clear(self, tenant_id: str) -> None:
        """Forget all answers of a tenant, here and in Valkey. What cannot be forgotten there now expires by itself."""
        for key in [key for key in self._near if key.tenant_id == tenant_id]:
            self._near.pop(key, None)
        head = f"tutelage:cached:{tenant_id}"
        try:
            async with asyncio.timeout(10 * self._deadline):
                names = await self._client.zrange(f"{head}:order", 0, -1)
                held = int(await self._client.getdel(f"{head}:bytes") or 0)
                await self._client.delete(f"{head}:order", f"{head}:sizes", *names)
                await self._client.decrby("tutelage:cached:bytes", held)
        except FAULTS as failed:
            self._unkept(failed)

    async def close(self) -> None:
        try:
            async with asyncio.timeout(10 * self._deadline):
                await self._keeps.join()
        except TimeoutError:
            log.warning("some answers were not kept in Valkey before the end")
        await self._client.aclose()

    @property
    def _down(self) -> bool:
        return self._clock() < self._down_until

    async def _far(self, key: CacheKey, looking: Looking | None) -> Entry | None:
        if looking is None and self._down:
            return None
        try:
            return await (looking or self._looks.begin(key))
        except FAULTS as failed:
            if not self._down:  # one line an outage, not one a request
                log.warning("cache look-ups are misses for a while: %r", failed)
            self._down_until = self._clock() + PAUSE_SECONDS
            return None

    async def _get(self, keys: list[CacheKey]) -> list[Entry | None]:
        async with within(self._deadline):
            values = await self._client.mget([str(key) for key in keys])
        found = [None if value is None else self._read(key, value) for key, value in zip(keys, values, strict=True)]
        for key, entry, value in zip(keys, found, values, strict=True):
            if entry is not None:
                self._hold(key, value[MAC_BYTES:])
        return found

    def _read(self, key: CacheKey, value: bytes) -> Entry | None:
        """None for what was not written by us under this very key."""
        mac, content = value[:MAC_BYTES], value[MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(key, content)):
            log.warning("a cache entry of tenant %s is not what was written; ignored", key.tenant_id)
            return None
        return Entry(*orjson.loads(content))

    async def _set(self, kept: list[Keeping]) -> list[None]:
        values: list[Any] = [*self._bounds]
        for one in kept:
            values += (f"tutelage:cached:{one.key.tenant_id}", one.value, one.seconds)
        async with asyncio.timeout(10 * self._deadline):  # nobody waits for it
            await self._script(keys=[str(one.key) for one in kept], args=values)
        return [None] * len(kept)

    def _unkept(self, failed: Exception) -> None:
        if not self._down:
            log.warning("answers are not kept in Valkey for a while: %r", failed)
        self._down_until = self._clock() + PAUSE_SECONDS

    def _hold(self, key: CacheKey, value: bytes) -> None:
        if len(value) <= self._near.maxsize // 8:
            self._near[key] = bytes(memoryview(value))  # a copy of its own size: what orjson returns keeps the room it was written in, 4 kB

    def _mac(self, key: CacheKey, content: bytes) -> bytes:
        return hashlib.blake2b(str(key).encode() + content, key=self._secret, digest_size=MAC_BYTES).digest()

    def _count(self, key: CacheKey, what: str) -> None:
        self.statistics.setdefault(key.tenant_id, Counter())[what] += 1
