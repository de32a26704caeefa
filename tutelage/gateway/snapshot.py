"""What a gateway worker knows of the database: keys, tenants, domains and students, read in the background.

Requests use the last snapshot and never wait for the database; when it is down, the last one keeps serving. It refuses to decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from tutelage.errors import Unavailable
from tutelage.evolution.rollout import takes
from tutelage.gateway.limits import holdings
from tutelage.records import Key, Tenant
from tutelage.routing.confidence import Calibrator
from tutelage.routing.domains import Domain, DomainIndex
from tutelage.routing.drift import watch
from tutelage.routing.policy import Policy, StudentSnapshot
from tutelage.settings import RoutingSettings
from tutelage.stores import outcomes, policies, registry, tenants
from tutelage.stores.database import Pool
from tutelage.tasks import end

log = logging.getLogger(__name__)

OUTCOME_SECONDS = 2.0  # outcomes come all the time: they alone have everything read again so often at most


@dataclass(frozen=True)
class Challenger:
    """A version on its way to replace the champion of its domain: `percent` of the requests are its own (`rollout.takes`), with 0 it
    answers beside the champion, for comparison only."""

    student: StudentSnapshot
    adapter: str
    percent: int


@dataclass(frozen=True)
class TenantView:
    """One tenant's routing: its domains and the students that answer them. `lineages`: those of its students' versions in charge.
    `challengers`: by domain; `spawned`: by domain, a student that is being trained and answers in the teacher's shadow alone, as the base
    it begins with. `policy`: None where it is routed as configured."""

    index: DomainIndex | None
    students: tuple[StudentSnapshot, ...]
    adapters: dict[str, str]  # student name -> adapter name on the tier
    lineages: frozenset[str]
    challengers: Mapping[str, Challenger] = field(default_factory=dict)
    spawned: Mapping[str, Challenger] = field(default_factory=dict)
    policy: Policy | None = None

    def serving(self, student: StudentSnapshot, prompt: str) -> tuple[StudentSnapshot, str]:
        """Who answers in the place of a domain's champion, and its adapter: the challenger of the domain for its share of the requests."""
        challenger = self.challengers.get(student.domain)
        if challenger is not None and takes(challenger.adapter, hashlib.sha256(prompt.encode()).digest(), challenger.percent):
            return challenger.student, challenger.adapter
        return student, self.adapters[student.name]


def lineage_of(student: StudentSnapshot) -> str:
    """What names a student's version, and so every answer it gave."""
    return f"student:{student.name}:{student.digest}"


EMPTY = TenantView(None, (), {}, frozenset())


@dataclass(frozen=True)
class Snapshot:
    epoch: int = -1
    keys: dict[str, Key] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    views: dict[str, TenantView] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)  # bytes of prompts and answers kept, by tenant
    outcomes: int = 0  # the last one that students' confidence was held against

    def full(self, tenant: Tenant) -> bool:
        """Whether a tenant keeps as much as it may: it is answered as ever, but no more is kept of it."""
        return full(tenant, self.stored)

    def view(self, tenant_id: str) -> TenantView:
        return self.views.get(tenant_id, EMPTY)


def full(tenant: Tenant, stored: Mapping[str, int]) -> bool:
    most = holdings(tenant.tier, tenant.limits).storage_bytes
    return most is not None and stored.get(tenant.id, 0) >= most


async def read(pool: Pool, *, routing: RoutingSettings, teachers: Sequence[str]) -> Snapshot:
    """A whole new snapshot. The epoch is read first, so a change made meanwhile is seen at the next look."""
    epoch, last = await _moved(pool)
    domains = await registry.read_domains(pool)
    champions, challengers = await registry.champions(pool), await registry.challengers(pool)
    spawned = await registry.spawned(pool)
    newest = await outcomes.newest(pool, limit=routing.outcome_window, teachers=teachers)
    held = {tenant_id: in_force(row["version"], row["settings"], routing) for tenant_id, row in (await policies.active(pool)).items()}
    return Snapshot(
        epoch=int(epoch),
        keys={key.id: key for key in await tenants.list_keys(pool)},
        tenants={tenant.id: tenant for tenant in await tenants.list_tenants(pool)},
        views={
            tenant_id: _view(
                [Domain.from_dict(record) for record in domains.get(tenant_id, [])],
                [c for c in champions if c.tenant_id == tenant_id],
                [(c, percent) for c, percent in challengers if c.tenant_id == tenant_id],
                [s for s in spawned if s.tenant_id == tenant_id],
                newest,
                held.get(tenant_id),
                routing,
            )
            for tenant_id in {*domains, *held, *(c.tenant_id for c in champions), *(s.tenant_id for s in spawned)}
        },
        outcomes=last,
        stored=await tenants.stored_bytes(pool),
    )


def in_force(version: int, settings: Mapping[str, Any], routing: RoutingSettings) -> Policy:
    """A tenant's policy: what its version sets, the rest as configured."""
    return Policy(version, settings.get("threshold", routing.threshold), settings.get("similarity", routing.similarity))


async def _moved(pool: Pool) -> tuple[int, int]:
    """The epoch, and the last outcome."""
    row = await pool.fetchrow("select value, (select coalesce(max(id), 0) from outcomes) as last from epochs where topic = 'gateway'")
    assert row is not None
    return int(row["value"]), int(row["last"])


def _view(
    domains: list[Domain],
    champions: list[registry.Champion],
    challengers: list[tuple[registry.Champion, int]],
    spawned: list[registry.Champion],
    newest: Mapping[str, Sequence[tuple[float, float]]],
    policy: Policy | None,
    routing: RoutingSettings,
) -> TenantView:
    threshold = policy.threshold if policy else routing.threshold
    students = tuple(_student(c, newest, threshold) for c in champions)
    contending = {c.domain: Challenger(_student(c, newest, threshold), c.adapter, percent) for c, percent in challengers}
    answering = [c.student for c in contending.values() if c.percent]
    return TenantView(
        DomainIndex(domains) if domains else None,
        students,
        {c.student: c.adapter for c in champions},
        frozenset(map(lineage_of, [*students, *answering])),
        contending,
        {s.domain: Challenger(_student(s, {}, threshold), s.adapter, 0) for s in spawned},
        policy,
    )


def _student(c: registry.Champion, newest: Mapping[str, Sequence[tuple[float, float]]], threshold: float) -> StudentSnapshot:
    kept = watch(Calibrator.from_dict(c.calibrator), newest.get(c.digest, ()))
    if kept.calibrator.reliability < 1:
        log.warning("%s v%d does not keep its promise: %s", c.student, c.version, kept.reason)
    return StudentSnapshot(c.student, c.version, c.tier, c.domain, c.digest, kept.calibrator, threshold)


class Watcher:
    """Keeps `current` fresh: looks every `seconds` and reads everything again when the epoch moved, or outcomes have come for a while."""

    def __init__(
        self, pool: Pool, *, seconds: float, routing: Callable[[], RoutingSettings], teachers: Callable[[], Sequence[str]]
    ) -> None:
        self._pool = pool
        self._seconds = seconds
        self._routing = routing
        self._teachers = teachers
        self._task: asyncio.Task[None] | None = None
        self._current: Snapshot | None = None
        self._stale = False
        self._read_at = 0.0

    @property
    def current(self) -> Snapshot:
        """Raises Unavailable before the first snapshot: a store outage at start is 503, never 401."""
        if self._current is None:
            raise Unavailable("the gateway is starting and has not read its keys yet; try again shortly", retry_after=1)
        return self._current

    @property
    def ready(self) -> bool:
        return self._current is not None

    def erasures(self, tenant_id: str) -> int:
        """How often texts of a tenant were erased; -1 for one that is gone."""
        tenant = self._current.tenants.get(tenant_id) if self._current else None
        return tenant.erasures if tenant else -1

    def read_again(self) -> None:
        """At the next look, whether or not the epoch has moved."""
        self._stale = True

    async def refresh(self) -> None:
        """Read everything now. Raises what the database raises."""
        self._read_at = time.monotonic()
        self._current = await read(self._pool, routing=self._routing(), teachers=self._teachers())

    async def start(self) -> None:
        with contextlib.suppress(OSError, asyncpg.PostgresError):
            await self.refresh()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await end(self._task)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                epoch, last = await _moved(self._pool)
                seen = self._current
                judged = seen is not None and last != seen.outcomes and time.monotonic() - self._read_at >= OUTCOME_SECONDS
                if seen is None or epoch != seen.epoch or judged or self._stale:
                    self._stale = False
                    await self.refresh()
            except Exception as failed:  # a bad row or a lost database must not end the watch: the last snapshot serves
                log.warning("snapshot not refreshed, the last one keeps serving: %r", failed)
