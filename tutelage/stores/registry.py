"""Domains, students, their versions and the promotion ledger.

The ledger is append-only and moved by compare-and-set: the sequence number a decision was read at must still be the last one.
MLflow shows the same facts to people; this ledger is what routing believes. It refuses to know how a verdict is reached.
"""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import asyncpg

from tutelage.errors import CycleRunning, NotFound, PlanLimitReached, PromotionConflict
from tutelage.gateway.limits import holdings
from tutelage.records import Tier
from tutelage.stores import audit
from tutelage.stores.database import Pool
from tutelage.stores.tenants import bump

Action = Literal["promote", "keep", "refuse", "rollback", "challenge", "advance", "stop", "demote", "quarantine", "wait"]
ENGINE = "engine"  # the actor where rules decided and no person did


@dataclass(frozen=True)
class Pointer:
    """Who answers a domain now, and the ledger sequence that says so (0: nothing decided yet)."""

    sequence: int = 0
    student: str | None = None
    version: int | None = None
    tier: Tier | None = None


@dataclass(frozen=True)
class Decision:
    """One line of the promotion ledger; `champion` is the pointer after it, `actor` who decided."""

    tenant_id: str
    domain: str
    action: Action
    student: str
    version: int
    champion: Pointer
    reason: str
    evidence: dict[str, Any]
    actor: str = ENGINE


@dataclass(frozen=True)
class Champion:
    """A version that answers a domain: what the gateway routes to and the tier must hold."""

    tenant_id: str
    domain: str
    student: str
    version: int
    tier: Tier
    path: str
    digest: str
    calibrator: dict[str, Any]

    @property
    def adapter(self) -> str:
        return adapter_name(self.student, self.version)


FRESH = "fresh"  # the folder of the adapter that a version begins with, beside `adapter`


def adapter_name(student: str, version: int) -> str:
    """The name under which a tier knows one version of a student."""
    return f"{student}.v{version}"


async def save_domains(pool: Pool, tenant_id: str, records: Sequence[dict[str, Any]]) -> None:
    """Replace the tenant's domains; each record carries its `name`."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("delete from domains where tenant_id = $1", tenant_id)
        await connection.executemany(
            "insert into domains (tenant_id, name, record) values ($1, $2, $3)",
            [(tenant_id, r["name"], r) for r in records],
        )
        await bump(connection)


async def read_domains(pool: Pool) -> dict[str, list[dict[str, Any]]]:
    """Domain records by tenant id."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in await pool.fetch("select tenant_id, record from domains order by tenant_id, name"):
        found.setdefault(row["tenant_id"], []).append(row["record"])
    return found


async def open_cycle(pool: Pool, cycle_id: str, tenant_id: str) -> None:
    """Raises CycleRunning when this tenant's cycle is running already."""
    try:
        await pool.execute("insert into cycles (id, tenant_id) values ($1, $2)", cycle_id, tenant_id)
    except asyncpg.UniqueViolationError as running:
        raise CycleRunning(f"an evolution cycle of {tenant_id} is running; wait for it to end") from running


async def close_cycle(pool: Pool, cycle_id: str, *, status: str, summary: dict[str, Any]) -> None:
    await pool.execute("update cycles set status = $2, finished_at = now(), summary = $3 where id = $1", cycle_id, status, summary)


async def spawn(
    pool: Pool, *, tenant_id: str, domain: str, student: str, cycle_id: str, folder: str, most: int | None = None,
    teachers: Sequence[str] = (),
) -> int:  # fmt: skip
    """Register the next version of the domain's student and return its number; `folder` holds `{version}`.

    `most`: versions that the domain keeps to answer; the oldest that is not needed is retired for the new one (None: any number).

    Raises:
        PlanLimitReached: it would be a student more than the tenant may have (the next version of one it has is no new one), or the
            domain keeps as many versions as it may and needs all of them.
    """
    async with pool.acquire() as connection, connection.transaction():
        await _check_room(connection, tenant_id, student)
        if most is not None:
            await _make_room(connection, tenant_id, domain, student, most)
        await connection.execute(
            "insert into students (name, tenant_id, domain) values ($1, $2, $3) on conflict (name) do nothing",
            student,
            tenant_id,
            domain,
        )
        version: int = await connection.fetchval("select coalesce(max(version), 0) + 1 from versions where student = $1", student)
        await connection.execute(
            "insert into versions (student, version, cycle_id, status, path, teachers) values ($1, $2, $3, 'training', $4, $5)",
            student,
            version,
            cycle_id,
            folder.format(version=version),
            list(teachers),
        )
        return version


async def begin_with(pool: Pool, student: str, version: int, *, digest: str) -> None:
    """Note the fresh adapter that a version begins with, and tell the gateways: it is asked in the shadow of the teacher from now on."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("update versions set fresh_digest = $3 where student = $1 and version = $2", student, version, digest)
        await bump(connection)


async def _make_room(connection: Any, tenant_id: str, domain: str, student: str, most: int) -> None:
    """Retire the oldest versions beyond the limit, but for the champion, a challenger and whoever a rollback would go back to."""
    kept = await connection.fetch(
        "select version from versions where student = $1 and status in ('training', 'waiting', 'challenger', 'student', 'ta', 'teacher') "
        "and not exists (select 1 from rollouts r where r.student = versions.student and r.version = versions.version) order by version",
        student,
    )
    held = await connection.fetchval("select count(*)::int from rollouts where student = $1", student)
    now = await pointer(connection, tenant_id, domain)
    former = await before(connection, tenant_id, domain, student=now.student or "", version=now.version or 0)
    needed = {now.version, former.version}
    spare = [row["version"] for row in kept if row["version"] not in needed]
    over = len(kept) + held + 1 - most
    if over > len(spare):
        raise PlanLimitReached(
            f"domain {domain!r} keeps {len(kept) + held} versions of its student, needs all of them and may keep {most}; "
            "raise max_models_per_domain in evolve.yaml"
        )
    for version in spare[: max(over, 0)]:
        await connection.execute(
            "update versions set status = 'retired', reason = $3 where student = $1 and version = $2",
            student,
            version,
            f"retired for a newer one: a domain keeps {most} versions (max_models_per_domain)",
        )


async def _check_room(connection: Any, tenant_id: str, student: str) -> None:
    # the tenant's row is held, so that two students registered at once are counted
    tenant = await connection.fetchrow("select name, tier, limits from tenants where id = $1 for update", tenant_id)
    if tenant is None:
        raise NotFound(f"no tenant {tenant_id!r}")
    others = await connection.fetchval("select count(*) from students where tenant_id = $1 and name <> $2", tenant_id, student)
    most = holdings(tenant["tier"], tenant["limits"]).models
    if most is not None and others >= most:
        raise PlanLimitReached(
            f"tenant {tenant['name']} ({tenant['tier']}) has {others} of {most} students and gets no other; "
            f"allow it more: tutelage tenants change {shlex.quote(tenant['name'])} --limit models={others + 1}, or --tier"
        )


async def count_students(pool: Pool) -> dict[str, int]:
    """Students by tenant."""
    return {row["tenant_id"]: row["n"] for row in await pool.fetch("select tenant_id, count(*)::int as n from students group by tenant_id")}


async def complete_version(pool: Pool, student: str, version: int, **facts: Any) -> None:
    """Set any of status, digest, base_fingerprint, calibrator, evidence, reason, mlflow_version, bento, awaits."""
    allowed = ("status", "digest", "base_fingerprint", "calibrator", "evidence", "reason", "mlflow_version", "bento", "awaits")
    unknown = sorted(set(facts) - set(allowed))
    if unknown:
        raise ValueError(f"a version has no {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    names = list(facts)
    sets = ", ".join(f"{name} = ${position + 3}" for position, name in enumerate(names))
    await pool.execute(
        f"update versions set {sets} where student = $1 and version = $2",  # noqa: S608 - column names checked above
        student,
        version,
        *(facts[name] for name in names),
    )


async def pointer(pool: Pool | Any, tenant_id: str, domain: str) -> Pointer:
    row = await pool.fetchrow(
        "select sequence, champion_student as student, champion_version as version, champion_tier as tier from promotions "
        "where tenant_id = $1 and domain = $2 order by sequence desc limit 1",
        tenant_id,
        domain,
    )
    return Pointer(**row) if row else Pointer()


async def decide(pool: Pool, decision: Decision, *, expected: int, within: Callable[[Any], Awaitable[None]] | None = None) -> Pointer:
    """Append a decision if the ledger still ends at `expected`, and wake the gateways; a person's is told in the audit chain too.

    `within`: what else becomes true with it or not at all; it is given the transaction's connection.

    Raises:
        PromotionConflict: another decision came first; read the pointer and judge again.
    """
    async with pool.acquire() as connection, connection.transaction():
        try:
            # the primary key is the compare-and-set: two writers that read the same end cannot both append
            moved = await connection.fetchval(
                "insert into promotions select $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, now(), $12 where $3 - 1 = "
                "(select coalesce(max(sequence), 0) from promotions where tenant_id = $1 and domain = $2) returning sequence",
                decision.tenant_id,
                decision.domain,
                expected + 1,
                decision.action,
                decision.student,
                decision.version,
                decision.champion.student,
                decision.champion.version,
                decision.champion.tier,
                decision.reason,
                decision.evidence,
                decision.actor,
            )
        except asyncpg.UniqueViolationError:
            moved = None
        if moved is None:
            raise PromotionConflict(
                f"the champion of {decision.domain!r} moved since sequence {expected}; read it again and decide on what is there now"
            )
        if decision.actor != ENGINE:
            told = {"domain": decision.domain, "reason": decision.reason, "champion": vars(decision.champion)}
            subject = adapter_name(decision.student, decision.version)
            action = f"student.{decision.action}"
            await audit.append(connection, tenant_id=decision.tenant_id, actor=decision.actor, action=action, subject=subject, detail=told)
        if within is not None:
            await within(connection)
        await bump(connection)
    return Pointer(moved, decision.champion.student, decision.champion.version, decision.champion.tier)


async def champions(pool: Pool) -> list[Champion]:
    """Every version that answers a domain now, all tenants but deleted ones."""
    rows = await pool.fetch(
        """
        select p.tenant_id, p.domain, v.student, v.version, p.champion_tier as tier, v.path, v.digest, v.calibrator
        from (select distinct on (tenant_id, domain) * from promotions order by tenant_id, domain, sequence desc) p
        join tenants t on t.id = p.tenant_id and t.status <> 'deleted'
        join versions v on v.student = p.champion_student and v.version = p.champion_version
        order by p.tenant_id, p.domain
        """
    )
    return [Champion(**row) for row in rows]


async def challengers(pool: Pool) -> list[tuple[Champion, int]]:
    """Every version on its way to replace a champion, with the percent of the requests it answers; all tenants but deleted ones."""
    rows = await pool.fetch(
        """
        select r.tenant_id, r.domain, v.student, v.version, r.tier, v.path, v.digest, v.calibrator, r.percent
        from rollouts r join tenants t on t.id = r.tenant_id and t.status <> 'deleted'
        join versions v on v.student = r.student and v.version = r.version and v.status = 'challenger' and v.digest is not null
        order by r.tenant_id, r.domain
        """
    )
    return [(Champion(**{name: row[name] for name in Champion.__dataclass_fields__}), row["percent"]) for row in rows]


async def spawned(pool: Pool) -> list[Champion]:
    """Every version in training, with the fresh adapter that it begins with: it is asked in the shadow of the teacher, never to serve."""
    rows = await pool.fetch(
        """
        select s.tenant_id, s.domain, v.student, v.version, v.path, v.fresh_digest as digest from versions v
        join students s on s.name = v.student join tenants t on t.id = s.tenant_id and t.status <> 'deleted'
        where v.status = 'training' and v.fresh_digest is not null order by s.tenant_id, s.domain, v.version
        """
    )
    return [Champion(**row, tier="student", calibrator={"kind": "unknown", "n": 0}) for row in rows]


async def versions_by_digest(pool: Pool, tenant_id: str) -> dict[str, tuple[str, int]]:
    """A tenant's student versions by the digest of their adapter."""
    rows = await pool.fetch(
        "select v.digest, v.student, v.version from versions v join students s on s.name = v.student "
        "where s.tenant_id = $1 and v.digest is not null order by v.version",
        tenant_id,
    )
    return {row["digest"]: (row["student"], row["version"]) for row in rows}


async def folders(pool: Pool, tenant_id: str) -> dict[tuple[str, int], Path]:
    """Where the files of each of a tenant's versions lie."""
    rows = await pool.fetch(
        "select v.student, v.version, v.path from versions v join students s on s.name = v.student where s.tenant_id = $1", tenant_id
    )
    return {(row["student"], row["version"]): Path(row["path"]) for row in rows}


async def before(pool: Pool | Any, tenant_id: str, domain: str, *, student: str, version: int) -> Pointer:
    """Who answered the domain before this version did and may do so again: never one that was rolled back, put in quarantine or refused
    since. A pointer to nobody (the teachers) where there is none. Its sequence is the ledger's end, for the compare-and-set."""
    now = await pointer(pool, tenant_id, domain)
    row = await pool.fetchrow(
        """
        select p.champion_student as student, p.champion_version as version, p.champion_tier as tier from promotions p
        join versions v on v.student = p.champion_student and v.version = p.champion_version
        where p.tenant_id = $1 and p.domain = $2 and (p.champion_student, p.champion_version) <> ($3::text, $4::int)
            and v.status in ('student', 'ta', 'teacher')
        order by p.sequence desc limit 1
        """,
        tenant_id,
        domain,
        student,
        version,
    )
    return Pointer(now.sequence, row["student"], row["version"], row["tier"]) if row else Pointer(now.sequence)


async def standby(pool: Pool) -> list[tuple[str, str, str]]:
    """Adapter name, folder and digest of every version that answers nobody alone but must answer at once: challengers on their way, and
    of each champion the one before it, so that a rollback waits for nothing."""
    rows = await pool.fetch(
        """
        with ends as (select distinct on (tenant_id, domain) * from promotions order by tenant_id, domain, sequence desc),
        former as (
            select distinct on (p.tenant_id, p.domain) p.champion_student as student, p.champion_version as version
            from promotions p join ends e using (tenant_id, domain)
            join versions v on v.student = p.champion_student and v.version = p.champion_version
            where (p.champion_student, p.champion_version) is distinct from (e.champion_student, e.champion_version)
                and v.status in ('student', 'ta', 'teacher')
            order by p.tenant_id, p.domain, p.sequence desc
        )
        select v.student, v.version, v.path, v.digest from versions v
        where (v.student, v.version) in (select student, version from former union select student, version from rollouts)
            and v.status in ('challenger', 'student', 'ta', 'teacher') and v.digest is not null
        """
    )
    return [(adapter_name(row["student"], row["version"]), row["path"], row["digest"]) for row in rows]


async def list_versions(pool: Pool) -> list[dict[str, Any]]:
    rows = await pool.fetch(
        """
        select s.tenant_id, s.domain, v.student, v.version, v.status, v.awaits, v.digest, v.reason, v.mlflow_version, v.bento, v.evidence,
            v.path, v.created_at, v.teachers, v.fresh_digest
        from versions v join students s on s.name = v.student order by s.tenant_id, s.domain, v.version
        """
    )
    return [dict(row) for row in rows]


async def list_promotions(pool: Pool) -> list[dict[str, Any]]:
    return [dict(row) for row in await pool.fetch("select * from promotions order by created_at, tenant_id, domain, sequence")]
