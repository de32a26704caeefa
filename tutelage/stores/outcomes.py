"""What answers turned out to be worth: from users, from comparisons with the teacher, from a judge. Rows are only added.

It refuses to know what follows from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.records import Feedback, Outcome
from tutelage.routing.drift import as_right
from tutelage.scoring import wilson
from tutelage.stores.database import Pool

COLUMNS = ("tenant_id", "request_id", "model", "digest", "domain", "score", "confidence", "value", "served", "source", "observed")


async def add(pool: Pool, outcomes: Sequence[Outcome]) -> None:
    """Raises asyncpg.ForeignKeyViolationError for a request that is not recorded."""
    places = ", ".join(f"${n}" for n in range(1, len(COLUMNS) + 1))
    await pool.executemany(
        f"insert into outcomes ({', '.join(COLUMNS)}) values ({places})",  # noqa: S608 - constants
        [tuple(getattr(outcome, column) for column in COLUMNS) for outcome in outcomes],
    )


async def add_feedback(connection: Any, feedback: Feedback) -> None:
    """A user's verdict as an outcome of the answer that was given; one that came from the cache is no new outcome of its model."""
    await connection.execute(
        """
        insert into outcomes (tenant_id, request_id, model, digest, domain, score, confidence, value, served, source, observed)
        select i.tenant_id, i.request_id, i.model, a.digest, i.domain, a.score, a.confidence, $3, true, 'feedback', 1
        from interactions i left join attempts a on a.request_id = i.request_id and a.accepted
        where i.request_id = $1 and i.tenant_id = $2 and i.endpoint = 'chat' and i.cache not like 'hit%'
        """,
        feedback.request_id,
        feedback.tenant_id,
        feedback.score,
    )


async def newest(pool: Pool, *, limit: int, teachers: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """The newest `limit` outcomes of every version in charge, oldest first, as (score, value) by its digest. What was held against one of
    the `teachers`, who err too, counts as `drift.as_right` says."""
    rows = await pool.fetch(
        """
        select v.digest, o.score, o.value, o.source, t.right_ones, t.judged
        from (select distinct on (tenant_id, domain) * from promotions order by tenant_id, domain, sequence desc) p
        join versions v on v.student = p.champion_student and v.version = p.champion_version
        cross join lateral (
            select count(*) filter (where value >= 0.5) as right_ones, count(*) as judged from (
                select value from outcomes
                where tenant_id = p.tenant_id and model = any($2) and digest is null and source = 'feedback' order by id desc limit $1
            ) said
        ) t
        cross join lateral (
            select id, score, value, source from outcomes
            where tenant_id = p.tenant_id and model = v.student and digest = v.digest and score is not null
            order by id desc limit $1
        ) o
        order by v.digest, o.id
        """,
        limit,
        list(teachers),
    )
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        compared = row["source"] == "teacher"
        value = as_right(row["value"], wilson(row["right_ones"], row["judged"])) if compared else row["value"]
        found.setdefault(row["digest"], []).append((row["score"], value))
    return found


async def tries(pool: Pool, tenant_id: str, *, limit: int) -> list[dict[str, Any]]:
    """The newest `limit` first tries of students that a strategy had answer, with what they turned out to be worth (None: nobody looked)
    and whether a judge said so. Users' feedback is left out: nobody knows with which probability they give it."""
    rows = await pool.fetch(
        """
        select a.confidence, o.value, coalesce(o.observed, 1.0) as observed, coalesce(o.source = 'judge', false) as judged
        from interactions i
        join attempts a on a.request_id = i.request_id and a.position = 0 and a.confidence > 0
        left join lateral (
            select value, observed, source from outcomes
            where request_id = i.request_id and model = a.model and source <> 'feedback' order by id desc limit 1
        ) o on true
        where i.tenant_id = $1 and i.propensity is not null
        order by i.created_at desc, i.request_id limit $2
        """,
        tenant_id,
        limit,
    )
    return [dict(row) for row in rows]


async def choices(pool: Pool, tenant_id: str, *, limit: int) -> list[dict[str, Any]]:
    """As `tries`, of requests that one model answered alone."""
    rows = await pool.fetch(
        """
        select i.similarity, i.tier <> 'teacher' as cheap, i.propensity, o.value, coalesce(o.observed, 1.0) as observed,
            coalesce(o.source = 'judge', false) as judged
        from interactions i
        left join lateral (
            select value, observed, source from outcomes
            where request_id = i.request_id and served and source <> 'feedback' order by id desc limit 1
        ) o on true
        where i.tenant_id = $1 and i.propensity < 1 and i.similarity is not null
            and not exists (select from attempts where request_id = i.request_id)
        order by i.created_at desc, i.request_id limit $2
        """,
        tenant_id,
        limit,
    )
    return [dict(row) for row in rows]
