"""Evidence of each version as counts that outlive the texts, rollouts on their way, watches, and how far the outcomes were looked at.

Counts and the place up to which they count move in one transaction, so an outcome counts once whatever crashes. It refuses to decide.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from tutelage.errors import PromotionConflict
from tutelage.evolution.evidence import Tally
from tutelage.evolution.watch import Watched
from tutelage.records import Tier
from tutelage.stores.database import Pool
from tutelage.stores.tenants import bump

# held-out: frozen items; live: users' verdicts; shadow: comparisons with the teacher; their pairs; stage: all pairs since it began
Source = Literal["held-out", "live", "shadow", "pairs", "shadow-pairs", "stage"]
Question = Literal["ta", "teacher", "champion"]  # what a test of the year asks about a version
Version = tuple[str, int]
SETTLED = "interval '2 seconds'"  # younger rows may still be overtaken by ones that are being written

# A student that has become a teacher is still not what a student is measured against.
BY_STUDENT = "exists (select from attempts g where g.request_id = i.request_id and g.accepted and g.model = i.model)"
COMPARISON = "o.digest is not null and o.source in ('teacher', 'judge')"
OUTCOMES = f"""
    select f.id, f.request_id, f.label, f.score, case when i.tier = 'teacher' and not {BY_STUDENT} then b.answer end as teacher, i.domain,
        a.digest, a.answer, a.accepted, i.prompt_hash, c.id as compared_id, c.value, c.observed
    from feedback f join interactions i using (request_id) join attempts a using (request_id) left join bodies b using (request_id)
    left join lateral (
        select o.id, o.value, o.observed from outcomes o
        where o.request_id = f.request_id and o.digest = a.digest and {COMPARISON} order by o.id limit 1
    ) c on true
    where f.tenant_id = $1 and f.id > $2 and f.created_at < now() - {SETTLED} and a.digest is not null and a.answer <> ''
        and not exists (select 1 from feedback e where e.request_id = f.request_id and e.id < f.id)
    order by f.id, a.position limit $3
"""  # noqa: S608 - constants
COMPARED = f"""
    select o.id, o.request_id, o.digest, o.value, o.served, o.observed, i.domain, i.prompt_hash,
        coalesce((select f.label is not null or o.served from feedback f where f.request_id = o.request_id and f.id <= $4
            order by f.id limit 1), false)
        and exists (select from attempts a where a.request_id = o.request_id and a.digest = o.digest and a.answer <> '') as overruled
    from outcomes o join interactions i using (request_id)
    where o.tenant_id = $1 and o.id > $2 and o.created_at < now() - {SETTLED} and {COMPARISON} order by o.id limit $3
"""  # noqa: S608 - constants
SERVED = f"""
    select i.created_at, i.latency_ms, a.digest, a.accepted, a.reason like 'not the whole answer%' as truncated,
        a.reason like 'failed: %' as failed
    from interactions i join attempts a using (request_id)
    where i.tenant_id = $1 and i.created_at > $2 and i.created_at < now() - {SETTLED} and a.digest is not null
    order by i.created_at, i.request_id limit $3
"""  # noqa: S608 - constants


@dataclass(frozen=True)
class Looked:
    """Up to where a tenant's outcomes were counted: the last feedback, when the last request was served, the last comparison."""

    feedback_id: int
    served_until: datetime
    outcome_id: int = 0


@dataclass(frozen=True)
class Rollout:
    """A challenger on its way in a domain. `waiting`: outcomes of each side not yet paired."""

    tenant_id: str
    domain: str
    student: str
    version: int
    percent: int
    tier: Tier
    waiting: Mapping[str, Sequence[bool]] = field(default_factory=dict)


@dataclass
class News:
    """What one look found, to be kept together."""

    tallies: dict[tuple[str, int, Source], Tally] = field(default_factory=dict)
    overruled: list[tuple[Version, Tally, int]] = field(default_factory=list)  # comparisons to be counted no longer, each with its id
    watches: dict[tuple[str, int], list[tuple[Watched, float | None]]] = field(default_factory=dict)
    waiting: dict[str, Mapping[str, Sequence[bool]]] = field(default_factory=dict)  # by domain

    def count(self, version: Version, source: Source, tally: Tally) -> None:
        key = (*version, source)
        self.tallies[key] = self.tallies.get(key, Tally()) + tally


async def enrol(pool: Pool, student: str, version: int, question: Question, *, year: int) -> tuple[int, int]:
    """The number of this question about a version among the year's tests (given once), and how many of the others were passed."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("select pg_advisory_xact_lock(hashtext('tests'))")  # numbers follow one another
        await connection.execute(
            "insert into tests (number, year, student, version, question) "
            "select coalesce(max(number), 0) + 1, $1, $2, $3, $4 from tests where year = $1 "
            "on conflict (student, version, question) do nothing",
            year,
            student,
            version,
            question,
        )
        own = await connection.fetchrow(
            "select number, year from tests where student = $1 and version = $2 and question = $3", student, version, question
        )
        if own is None:
            raise LookupError(f"version {version} of {student!r} was not enrolled")
        passed = await connection.fetchval(
            "select count(*)::int from tests where year = $1 and passed and number <> $2", own["year"], own["number"]
        )
    return int(own["number"]), int(passed)


async def mark_passed(pool: Pool, student: str, version: int, question: Question) -> None:
    await pool.execute("update tests set passed = true where student = $1 and version = $2 and question = $3", student, version, question)


async def add(pool: Pool | Any, version: Version, source: Source, tally: Tally) -> None:
    await pool.execute(
        "insert into evidence values ($1, $2, $3, $4, $5, $6) on conflict (student, version, source) do update "
        "set wins = evidence.wins + excluded.wins, ties = evidence.ties + excluded.ties, losses = evidence.losses + excluded.losses",
        *version,
        source,
        tally.wins,
        tally.ties,
        tally.losses,
    )


async def forget(pool: Pool | Any, version: Version, *sources: Source) -> None:
    """Begin counts anew: what follows is asked of the version in another place."""
    for source in sources:
        await pool.execute(
            "insert into evidence (student, version, source, since) select $1, $2, $3, coalesce(max(l.outcome_id), 0) "
            "from students s join looked l using (tenant_id) where s.name = $1 "
            "on conflict (student, version, source) do update set wins = 0, ties = 0, losses = 0, since = excluded.since",
            *version,
            source,
        )


async def renew(pool: Pool, version: Version) -> None:
    """Begin what is known of a version in service anew: a person has put it there whatever was said of it before."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("delete from watches where student = $1 and version = $2", *version)
        await forget(connection, version, "live", "shadow")


async def read(pool: Pool, version: Version) -> dict[str, Tally]:
    """A version's counts by source; sources without any are left out."""
    rows = await pool.fetch(
        "select source, wins, ties, losses from evidence where student = $1 and version = $2 and wins + ties + losses > 0", *version
    )
    return {row["source"]: Tally(row["wins"], row["ties"], row["losses"]) for row in rows}


async def looked(pool: Pool, tenant_id: str) -> Looked:
    await pool.execute("insert into looked (tenant_id) values ($1) on conflict do nothing", tenant_id)
    row = await pool.fetchrow("select feedback_id, served_until, outcome_id from looked where tenant_id = $1", tenant_id)
    if row is None:
        raise LookupError(f"tenant {tenant_id!r} went away")
    return Looked(**row)


async def outcomes(pool: Pool, tenant_id: str, since: Looked, *, most: int) -> list[dict[str, Any]]:
    """Attempts at requests that a user judged since then, a row each, with what a comparison said of it (`compared_id`: None, none did);
    only a request's first verdict counts."""
    return [dict(row) for row in await pool.fetch(OUTCOMES, tenant_id, since.feedback_id, most)]


async def comparisons(pool: Pool, tenant_id: str, since: Looked, *, judged_to: int, most: int) -> list[dict[str, Any]]:
    """Answers of students' versions that were held against the teacher's since then. `overruled`: a user's verdict, the feedback with id
    `judged_to` or one before it, says of it what counts."""
    return [dict(row) for row in await pool.fetch(COMPARED, tenant_id, since.outcome_id, most, judged_to)]


async def prompts(pool: Pool, request_ids: Collection[str]) -> frozenset[bytes]:
    """The hashes of what these requests asked."""
    rows = await pool.fetch(
        "select distinct prompt_hash from interactions where request_id = any($1) and prompt_hash <> ''", list(request_ids)
    )
    return frozenset(row["prompt_hash"] for row in rows)


async def served(pool: Pool, tenant_id: str, since: Looked, *, most: int) -> list[dict[str, Any]]:
    """Attempts since then, with how long the reply took and whether the student's answer was cut off."""
    return [dict(row) for row in await pool.fetch(SERVED, tenant_id, since.served_until, most)]


async def keep(pool: Pool, tenant_id: str, news: News, *, before: Looked, after: Looked) -> None:
    """Add what was found, if nobody else has counted from `before` on meanwhile. Raises PromotionConflict."""
    async with pool.acquire() as connection, connection.transaction():
        moved = await connection.fetchval(
            "update looked set feedback_id = $5, served_until = $6, outcome_id = $7 "
            "where tenant_id = $1 and feedback_id = $2 and served_until = $3 and outcome_id = $4 returning 1",
            tenant_id,
            before.feedback_id,
            before.served_until,
            before.outcome_id,
            after.feedback_id,
            after.served_until,
            after.outcome_id,
        )
        if moved is None:
            raise PromotionConflict(f"the outcomes of {tenant_id} were counted by another watch; look again")
        for (student, version, source), tally in news.tallies.items():
            await add(connection, (student, version), source, tally)
        for overruled, tally, outcome_id in news.overruled:
            await _take_back(connection, overruled, tally, outcome_id)
        for domain, waiting in news.waiting.items():
            await connection.execute(
                "update rollouts set waiting = $3 where tenant_id = $1 and domain = $2", tenant_id, domain, dict(waiting)
            )
        for (student, version), followed in news.watches.items():
            for watched, baseline in followed:
                await _keep_watch(connection, student, version, watched, baseline)


async def _take_back(connection: Any, version: Version, tally: Tally, outcome_id: int) -> None:
    """Of a comparison that is in the count: one from before the count began anew is not."""
    await connection.execute(
        "update evidence set wins = greatest(wins - $3, 0), losses = greatest(losses - $4, 0) "
        "where student = $1 and version = $2 and source = 'shadow' and since < $5",
        *version,
        tally.wins,
        tally.losses,
        outcome_id,
    )


async def _keep_watch(connection: Any, student: str, version: int, watched: Watched, baseline: float | None) -> None:
    await connection.execute(
        "insert into watches values ($1, $2, $3, $4, $5, $6, $7, $8, $9) on conflict (student, version, signal) do update set "
        "baseline = excluded.baseline, state = excluded.state, seen = excluded.seen, bad = excluded.bad, alarm = excluded.alarm, "
        "reason = excluded.reason",
        student,
        version,
        watched.signal,
        baseline,
        list(watched.state),
        watched.seen,
        watched.bad,
        watched.alarm,
        watched.reason,
    )


async def watches(pool: Pool, version: Version) -> dict[str, tuple[Watched, float | None]]:
    """A version's watches so far by signal, each with its frozen baseline (None: not frozen yet)."""
    rows = await pool.fetch("select * from watches where student = $1 and version = $2", *version)
    return {
        r["signal"]: (Watched(r["signal"], tuple(r["state"]), r["seen"], r["bad"], r["alarm"], r["reason"]), r["baseline"]) for r in rows
    }


async def begin_rollout(connection: Pool | Any, rollout: Rollout) -> None:
    """Put a challenger into shadow in its domain, in place of one that was on its way there."""
    await connection.execute(
        "insert into rollouts (tenant_id, domain, student, version, percent, tier) values ($1, $2, $3, $4, $5, $6) "
        "on conflict (tenant_id, domain) do update set student = excluded.student, version = excluded.version, "
        "percent = excluded.percent, tier = excluded.tier, waiting = excluded.waiting, updated_at = now()",
        rollout.tenant_id,
        rollout.domain,
        rollout.student,
        rollout.version,
        rollout.percent,
        rollout.tier,
    )
    await bump(connection)


async def move_rollout(pool: Pool, rollout: Rollout, *, percent: int) -> None:
    """On to the next share, with a stage's count begun anew; 100 % or none at all end it."""
    async with pool.acquire() as connection, connection.transaction():
        await forget(connection, (rollout.student, rollout.version), "stage")
        if 0 < percent < 100:
            await connection.execute(
                "update rollouts set percent = $3, updated_at = now() where tenant_id = $1 and domain = $2",
                rollout.tenant_id,
                rollout.domain,
                percent,
            )
        else:
            await connection.execute("delete from rollouts where tenant_id = $1 and domain = $2", rollout.tenant_id, rollout.domain)
        await bump(connection)


async def rollouts(pool: Pool) -> list[Rollout]:
    """Every challenger on its way, all tenants."""
    rows = await pool.fetch("select tenant_id, domain, student, version, percent, tier, waiting from rollouts order by tenant_id, domain")
    return [Rollout(**row) for row in rows]


async def prices(pool: Pool, digests: Sequence[str]) -> dict[str, float]:
    """Mean micro-dollars of an answer by adapter digest; those that never answered are left out."""
    rows = await pool.fetch(
        "select digest, avg(cost_microusd)::float8 as price from attempts where digest = any($1) and score is not null group by digest",
        list(digests),
    )
    return {row["digest"]: row["price"] for row in rows}
