"""What reviewers decide on: each student's versions as the ledger has them, and the names they were last shown under in MLflow.

It refuses to know how a name is shown and what follows from one that was moved.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tutelage.evolution.review import TIERS, Names, Standing
from tutelage.records import Tier
from tutelage.stores import evidence, registry
from tutelage.stores.database import Pool
from tutelage.stores.evidence import Version

UNABLE = ("training", "abandoned", "quarantined")
VERSIONS = """
    select s.name, s.tenant_id, s.domain, v.version, v.status, v.awaits, v.mlflow_version, v.path, v.digest, v.bento,
        (select coalesce(max(p.sequence), 0) from promotions p where p.tenant_id = s.tenant_id and p.domain = s.domain) as sequence,
        coalesce(p.sequence, 0) as told, p.shown, p.meant
    from versions v join students s on s.name = v.student left join projections p on p.student = s.name
    where v.mlflow_version is not null order by s.name, v.version
"""


@dataclass(frozen=True)
class Slot:
    """A student as MLflow shows it: `published` are its versions by MLflow's own number, `status` what became of each. `shown` and `meant`
    are its names after and during the last projection; None: it was never projected. `sequence` ends its ledger, `told` what of it is
    shown."""

    student: str
    tenant_id: str
    domain: str
    standing: Standing
    percent: int
    published: Mapping[str, int]
    status: Mapping[int, str]
    files: Mapping[int, tuple[str, str]]  # folder and digest
    packed: frozenset[int]  # versions that are Bentos
    sequence: int
    told: int
    shown: Names | None
    meant: Names

    def unpacked(self) -> list[int]:
        """Who answers above the tier of a student, or may soon, and is no Bento: the gate packs what it promotes, not what is moved up
        later, by a person or by what it showed."""
        held = self.standing
        above = [held.champion if held.tier != "student" else None, held.challenger]
        return [version for version in above if version is not None and version not in self.packed]

    def number(self, version: int) -> str:
        """MLflow's number of a version."""
        return next(number for number, ours in self.published.items() if ours == version)


async def slots(pool: Pool) -> list[Slot]:
    """Every student of which MLflow has a version."""
    champions = {(c.student, c.version): c for c in await registry.champions(pool)}
    going = {(r.student, r.version): r for r in await evidence.rollouts(pool)}
    grouped: dict[str, list[Any]] = {}
    for row in await pool.fetch(VERSIONS):
        grouped.setdefault(row["name"], []).append(row)
    return [_slot(rows, champions, going) for rows in grouped.values()]


def _slot(rows: list[Any], champions: Mapping[Version, registry.Champion], going: Mapping[Version, evidence.Rollout]) -> Slot:
    name, first = rows[0]["name"], rows[0]
    mine = {row["version"]: row for row in rows}
    champion = next((champions[name, version] for version in mine if (name, version) in champions), None)
    rollout = next((going[name, version] for version in mine if (name, version) in going), None)
    standing = Standing(
        champion=champion.version if champion else None,
        tier=champion.tier if champion else None,
        challenger=rollout.version if rollout else None,
        able={v: _tier(row, rollout) for v, row in mine.items() if row["digest"] and row["status"] not in UNABLE},
        waiting={v: row["awaits"] for v, row in mine.items() if row["awaits"]},
        out=frozenset(v for v, row in mine.items() if row["status"] in ("refused", "quarantined")),
    )
    return Slot(
        name, first["tenant_id"], first["domain"], standing, rollout.percent if rollout else 0,
        {row["mlflow_version"]: v for v, row in mine.items()}, {v: row["status"] for v, row in mine.items()},
        {v: (row["path"], row["digest"] or "") for v, row in mine.items()}, frozenset(v for v, row in mine.items() if row["bento"]),
        first["sequence"], first["told"], first["shown"], first["meant"] or {},
    )  # fmt: skip


def _tier(row: Any, rollout: evidence.Rollout | None) -> Tier:
    """The tier that a version answers as when a person has it answer."""
    if row["status"] in TIERS:
        return row["status"]  # type: ignore[no-any-return]
    if rollout is not None and rollout.version == row["version"]:
        return rollout.tier
    return row["awaits"] or "student"


async def mean(pool: Pool, student: str, names: Names) -> None:
    """Note that these names are about to be put."""
    await pool.execute(
        "insert into projections (student, meant) values ($1, $2) on conflict (student) do update set meant = excluded.meant",
        student,
        dict(names),
    )


async def shown(pool: Pool, student: str, names: Names, *, told: int) -> None:
    """Note that these names stand, and up to where the ledger is told beside them."""
    await pool.execute("update projections set shown = $2, meant = $2, sequence = $3 where student = $1", student, dict(names), told)


async def lines(pool: Pool, slot: Slot) -> list[dict[str, Any]]:
    """The ledger of a student's domain."""
    rows = await pool.fetch("select * from promotions where tenant_id = $1 and domain = $2 order by sequence", slot.tenant_id, slot.domain)
    return [dict(row) for row in rows]


@asynccontextmanager
async def alone(pool: Pool) -> AsyncIterator[bool]:
    """Whether nobody else looks at what reviewers did while the block runs."""
    async with pool.acquire() as connection:
        free = await connection.fetchval("select pg_try_advisory_lock(hashtext('review'))")
        try:
            yield bool(free)
        finally:
            if free:
                await connection.execute("select pg_advisory_unlock(hashtext('review'))")
