"""May this request run now? One script in Valkey decides for all workers at once, and takes from every limit or from none.

Requests that arrive while the script runs for others are decided together in its next call; nobody waits to give back.
While Valkey is slow or dead a worker goes on by itself: each tenant gets this worker's part of a hundredth of its daily queries,
once a day however often Valkey comes and goes, and its part of the rest. Counters that are gone are read from the ledger. So limits are
exact while Valkey is up; otherwise a daily quota is exceeded by at most 1 %, and by what was in flight when counters were lost. Tokens and
spend are not looked at during an outage. It refuses to know what a request says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from calendar import monthrange
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import orjson
from valkey.exceptions import ValkeyError

from tutelage.errors import LimitReached
from tutelage.gateway.batching import Batched
from tutelage.gateway.limits import Limits
from tutelage.gateway.patience import within
from tutelage.stores import counters
from tutelage.tasks import end

log = logging.getLogger(__name__)

MISSED_BEATS = 3  # of another worker, since somebody first found one missing: after an outage of Valkey everybody has missed some
BURIAL_SECONDS = 15  # one worker settles what a dead one left; if it dies over it, the next may soon: doing it twice changes nothing
OUTAGE_SHARE = 0.01  # of a daily quota, for all workers together, while nobody counts for them
LINGER_SECONDS = 0.002  # what is given back goes along with the next request that is decided, or so much later
MANY = 100  # requests: who may have so many is not held up by one that is given back a little later
SCRIPT = Path(__file__).parent / "scripts" / "limits.lua"
LIMITS = ("concurrent", "queries_per_day", "requests_per_minute", "tokens_per_minute", "spend_per_month_microusd")
TOLD = {
    "concurrent": ("concurrency_limit", "{limit} requests at once are allowed and that many are running; wait for one to end"),
    "queries_per_day": ("daily_quota_exceeded", "the {limit} queries of this UTC day are used up; ask your administrator for more"),
    "requests_per_minute": ("rate_limit_exceeded", "{limit} requests a minute are allowed; slow down"),
    "tokens_per_minute": ("token_rate_exceeded", "{limit} tokens a minute are allowed; slow down or ask for fewer tokens"),
    "spend_per_month_microusd": ("spend_limit_reached", "the spend limit of this UTC month ({limit} micro-dollars) is reached"),
}
WORKERS = "tutelage:workers"
FAULTS = (TimeoutError, ValkeyError, OSError)

Scope = Literal["tenant", "key"]


@dataclass(frozen=True, eq=False)
class Party:
    """A tenant, or one key of it, with its limits. The tenant is part of every counter's name."""

    scope: Scope
    tenant_id: str
    id: str
    limits: Limits

    @property
    def name(self) -> tuple[Scope, str, str]:
        return self.scope, self.tenant_id, self.id

    @cached_property
    def roomy(self) -> bool:
        """Whether another worker is not likely to need what a request of it gives back at this very moment."""
        limits = self.limits
        few = (limit is not None and limit < MANY for limit in (limits.concurrent, limits.queries_per_day))
        return not any(few) and limits.tokens_per_minute is None and limits.spend_per_month_microusd is None

    @property
    def head(self) -> str:
        """How the names of its counters begin."""
        return f"tutelage:{self.scope}:{self.tenant_id}:{self.id}"

    def bounds(self) -> list[int]:
        """Its limits in the order of LIMITS; -1 for none."""
        return [-1 if (limit := getattr(self.limits, name)) is None else limit for name in LIMITS]


@lru_cache(maxsize=10_000)
def _standing(parties: tuple[Party, ...], day: date) -> bytes:
    """What scripts/limits.lua must know of a request's parties, as JSON."""
    return orjson.dumps([[party.head, f"{day:%Y%m%d}", party.bounds()] for party in parties])


class Estimate(NamedTuple):
    """What a request may take before anybody knows: tokens in and out, micro-dollars."""

    tokens: int
    cost_microusd: int


@dataclass(slots=True)
class Meter:
    """What a running request was granted, and what it really took once it is in the ledger (nothing, not a query, when it failed)."""

    request_id: str
    parties: tuple[Party, ...]
    at: datetime
    reserved: Estimate
    local: bool = False
    doubtful: bool = False  # Valkey was asked and did not answer in time
    taken: Estimate | None = None

    @property
    def standing(self) -> bytes:
        return _standing(self.parties, self.at.date())

    def settle(self, *, tokens: int, cost_microusd: int) -> None:
        self.taken = Estimate(tokens, cost_microusd)


@dataclass(frozen=True)
class Used:
    """What the ledger says a party has used: queries of this UTC day, micro-dollars of this UTC month."""

    queries: int
    cost_microusd: int


@dataclass(frozen=True)
class Lost:
    """A request whose worker died while it ran: what it had reserved is what it will be billed."""

    request_id: str
    tenant_id: str
    key_id: str
    at: datetime
    reserved: Estimate


@dataclass
class Share:
    """What one worker lets through for one party while nobody counts for all workers: a pure rule, told the time (seconds)."""

    limits: Limits
    running: int = 0
    queries: int = 0
    level: float = math.inf  # requests left in the bucket
    at: float = 0.0

    def refusal(self, now: float, *, workers: int) -> str | None:
        """The limit that forbids another request now, if one does."""
        limits = self.limits
        rate = math.inf if limits.requests_per_minute is None else max(1.0, limits.requests_per_minute / workers)
        filled = 0.0 if self.at == 0.0 or math.isinf(rate) else max(0.0, now - self.at) * rate / 60
        self.level, self.at = min(rate, self.level + filled), now
        if limits.concurrent is not None and self.running >= max(1, limits.concurrent // workers):
            return "concurrent"
        if limits.queries_per_day is not None and self.queries >= math.floor(OUTAGE_SHARE * limits.queries_per_day / workers):
            return "queries_per_day"
        return "requests_per_minute" if self.level < 1 else None

    def take(self) -> None:
        self.running += 1
        self.queries += 1
        self.level -= 1


class Call(NamedTuple):
    """One request as scripts/limits.lua wants it."""

    verb: Literal["admit", "end"]
    standing: bytes
    request_id: str
    values: tuple[int | str, ...]


class Admission:
    """Grants requests their part of every limit. `used` reads the ledger; `lost` puts a request whose worker died on it, once, and
    returns what is on the ledger for it."""

    def __init__(
        self,
        url: str,
        *,
        used: Callable[[Party, datetime], Awaitable[Used]],
        lost: Callable[[Lost], Awaitable[Estimate]],
        deadline_seconds: float,
        slot_seconds: float,
        pause_seconds: float = 1.0,
        beat_seconds: float = 5.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = counters.connect(url, connect_seconds=deadline_seconds)
        self._script = self._client.register_script(SCRIPT.read_text())
        self._decisions: Batched[Call, tuple[str, int, int]] = Batched(self._decide, linger_seconds=LINGER_SECONDS)
        self._used = used
        self._lost = lost
        self._beat = beat_seconds
        self._beating: asyncio.Task[None] | None = None
        self._deadline = deadline_seconds
        self._slot_ms = round(slot_seconds * 1000)
        self._pause = pause_seconds
        self._clock = clock
        self._monotonic = monotonic
        self._down_until = 0.0
        self._shares: dict[tuple[Scope, str, str], Share] = {}
        self._day = self._clock().date()  # which the shares are of
        self._doubtful: list[Meter] = []  # ended; Valkey may have granted them without our hearing of it
        self._worker = uuid.uuid4().hex[:12]
        self.workers = 1

    @property
    def degraded(self) -> bool:
        """Whether this worker counts for itself just now."""
        return self._monotonic() < self._down_until

    def meter(self, request_id: str, parties: Sequence[Party], reserved: Estimate) -> Meter:
        """Of a request that is to be granted."""
        return Meter(request_id, tuple(parties), self._clock(), reserved)

    async def grant(self, meter: Meter) -> None:
        """Let a request run, until `end`. Raises LimitReached."""
        for _ in range(len(meter.parties) + 1):  # each may be unknown once
            if self.degraded:
                break
            try:
                limit, party, wait_ms = await self._ask(meter)
            except FAULTS as failed:
                if not self.degraded:  # one line an outage, not one a request
                    log.warning("limits are counted in this worker for a while: %r", failed)
                self._down_until = self._monotonic() + self._pause
                meter.doubtful = True
                break
            if limit != "unknown":
                _refuse_if(limit, party, meter, wait_ms)
                return
            await self._remember(party, meter)
        meter.local = True
        self._take_locally(meter)

    @asynccontextmanager
    async def granted(self, request_id: str, parties: Sequence[Party], reserved: Estimate) -> AsyncIterator[Meter]:
        """A request that is granted for the length of a block. Raises LimitReached."""
        meter = self.meter(request_id, parties, reserved)
        await self.grant(meter)
        try:
            yield meter
        finally:
            self.end(meter)

    async def start(self) -> None:
        """Be known among the workers from now on, and look after those that die."""
        self._beating = asyncio.create_task(self._live())

    async def close(self) -> None:
        await end(self._beating)
        with contextlib.suppress(*FAULTS):
            await asyncio.wait_for(self._decisions.join(), self._deadline)
            await asyncio.wait_for(self._leave(), self._deadline)
        await self._client.aclose()

    async def _leave(self) -> None:
        await self._client.srem(WORKERS, self._worker)
        await self._client.delete(_running(self._worker), _alive(self._worker))

    async def _live(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._report(), self._beat)
            except Exception as failed:  # the next beat tries again: a worker that stops beating counts as dead
                log.warning("workers could not be counted: %r", failed)
            await asyncio.sleep(self._beat)

    async def _report(self) -> None:
        await self._client.set(_alive(self._worker), 1, px=round(3000 * self._beat))
        await self._client.sadd(WORKERS, self._worker)
        names = [name.decode() for name in await self._client.smembers(WORKERS)]
        beats = await self._client.mget([_alive(name) for name in names])
        self.workers = max(1, sum(beat is not None for beat in beats))
        await self._client.delete(*(_missing(name) for name, beat in zip(names, beats, strict=True) if beat is not None))
        for name in await self._dead([name for name, beat in zip(names, beats, strict=True) if beat is None]):
            try:
                await self._bury(name)
            except FAULTS:
                raise
            except Exception as failed:  # what cannot be settled of one must not keep the others from it
                log.warning("what worker %s left running is not settled yet: %r", name, failed)
        while self._doubtful and not self.degraded:
            self._give_back_there(self._doubtful.pop())

    async def _dead(self, silent: Sequence[str]) -> list[str]:
        """Those that have long been silent. Since when is kept in Valkey: no one worker need live long enough to see it."""
        seconds, micro = await self._client.time()
        now, dead = seconds + micro / 1e6, []
        for name in silent:
            since = await self._client.set(_missing(name), now, nx=True, get=True, ex=86_400)
            if since is not None and now - float(since) >= (MISSED_BEATS - 1) * self._beat:
                dead.append(name)
        return dead

    async def _bury(self, worker: str) -> None:
        """Settle what a dead worker left running; one of the living does it."""
        if not await self._client.set(f"tutelage:worker:{worker}:burial", self._worker, nx=True, ex=BURIAL_SECONDS):
            return
        for request_id, kept in (await self._client.hgetall(_running(worker))).items():
            standing, call = kept.split(b"\n")
            _, _, _, _, tokens, cost, tenant_id, key_id, at = orjson.loads(call)
            reserved = Estimate(int(tokens), int(cost))
            billed = await self._lost(Lost(request_id.decode(), tenant_id, key_id, datetime.fromisoformat(at), reserved))
            back = (0, reserved.tokens - billed.tokens, reserved.cost_microusd - billed.cost_microusd)
            await self._decide([Call("end", standing, request_id.decode(), back)], worker)
        await self._client.srem(WORKERS, worker)
        await self._client.delete(_running(worker), _missing(worker))

    async def _ask(self, meter: Meter) -> tuple[str, Party, int]:
        reserved, whose = meter.reserved, meter.parties
        values = (self._slot_ms, reserved.tokens, reserved.cost_microusd, whose[0].tenant_id, whose[-1].id, meter.at.isoformat())
        limit, party, wait_ms = await self._decisions(Call("admit", meter.standing, meter.request_id, values))
        return limit, meter.parties[party], wait_ms

    async def _decide(self, calls: list[Call], worker: str | None = None) -> list[tuple[str, int, int]]:
        """One round trip for all calls, of this worker or for a dead one. Raises FAULTS; what was granted unheard of is given back by later
        beats."""
        if self.degraded:
            raise TimeoutError("Valkey did not answer a moment ago")
        places = {standing: place for place, standing in enumerate(dict.fromkeys(call.standing for call in calls), start=1)}
        asked = [[call.verb, places[call.standing], call.request_id, *call.values] for call in calls]
        async with within(self._deadline):
            told = await self._script(args=[_running(worker or self._worker), orjson.dumps([[*map(orjson.Fragment, places)], asked])])
        return [(limit, int(party), int(wait_ms)) for limit, party, wait_ms in orjson.loads(told)]

    async def _remember(self, party: Party, meter: Meter) -> None:
        """Set counters that are gone from what the ledger says; the first worker to do so wins."""
        used = await self._used(party, meter.at)
        day, month = f"{party.head}:day:{meter.at:%Y%m%d}", f"{party.head}:month:{meter.at:%Y%m}"
        try:
            await asyncio.wait_for(self._set(day, used.queries, month, used.cost_microusd), self._deadline)
        except FAULTS as failed:
            log.warning("counters could not be set from the ledger: %r", failed)
            self._down_until = self._monotonic() + self._pause

    async def _set(self, day: str, queries: int, month: str, cost: int) -> None:
        await self._client.set(day, queries, nx=True, ex=2 * 86_400)
        await self._client.set(month, cost, nx=True, ex=40 * 86_400)

    def _take_locally(self, meter: Meter) -> None:
        if meter.at.date() != self._day:
            self._shares, self._day = {}, meter.at.date()
        shares = [self._shares.setdefault(party.name, Share(party.limits)) for party in meter.parties]
        for party, share in zip(meter.parties, shares, strict=True):
            share.limits = party.limits
            limit = share.refusal(self._monotonic(), workers=self.workers)
            if limit is not None:
                _refuse_if(limit, party, meter, round(self._pause * 1000))
        for share in shares:
            share.take()

    def end(self, meter: Meter) -> None:
        """The request is over: what it has not taken is given back."""
        if not meter.local:
            self._give_back_there(meter)
            return
        for share in filter(None, (self._shares.get(party.name) for party in meter.parties)):
            share.running = max(0, share.running - 1)  # it may be a later day's
        if meter.doubtful:
            self._doubtful.append(meter)

    def _give_back_there(self, meter: Meter) -> None:
        """Give back in Valkey, where it is done once however often it is asked for. Nobody waits for it."""
        taken = meter.taken or Estimate(0, 0)
        unused = (int(meter.taken is None), meter.reserved.tokens - taken.tokens, meter.reserved.cost_microusd - taken.cost_microusd)
        call = Call("end", meter.standing, meter.request_id, unused)
        self._decisions.send(call, lambda failed: self._later(meter, failed), linger=all(party.roomy for party in meter.parties))

    def _later(self, meter: Meter, failed: Exception) -> None:
        if not self.degraded:
            log.warning("requests give back later what they had reserved: %r", failed)
            self._down_until = self._monotonic() + self._pause
        self._doubtful.append(meter)


def _alive(worker: str) -> str:
    return f"tutelage:worker:{worker}:alive"


def _missing(worker: str) -> str:
    return f"tutelage:worker:{worker}:missing"


def _running(worker: str) -> str:
    return f"tutelage:worker:{worker}:running"


def _refuse_if(limit: str, party: Party, meter: Meter, wait_ms: int) -> None:
    """Raise LimitReached unless `limit` is "none"."""
    if limit == "none":
        return
    code, told = TOLD[limit]
    ends = {"queries_per_day": _tomorrow(meter.at), "spend_per_month_microusd": _next_month(meter.at)}.get(limit)
    seconds = max(1, math.ceil((ends - meter.at).total_seconds() if ends else wait_ms / 1000))
    bound = getattr(party.limits, limit)
    raise LimitReached(f"limit of this {party.scope}: " + told.format(limit=f"{bound:,}"), code=code, retry_after=seconds)


def _tomorrow(now: datetime) -> datetime:
    return now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)


def _next_month(now: datetime) -> datetime:
    return _tomorrow(now.replace(day=monthrange(now.year, now.month)[1]))
