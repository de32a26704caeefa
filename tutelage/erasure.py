"""Everything of one tenant, wherever it is, and what learned from it: erased, put in quarantine, and certified.

The texts go (database, training files, DVC's copies, canaries, domains, cached replies); what was trained on them answers nobody any
more; the bill and the audit chain stay. What is left of a mixed data set is learned again by the next cycle. It refuses to ask whether
that is wanted.
"""

from __future__ import annotations

import asyncio
import base64
import shutil
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from tutelage.fleet import engines
from tutelage.records import Tenant
from tutelage.settings import Home
from tutelage.stores import audit, bodies, datasets, registry
from tutelage.stores.database import Pool
from tutelage.stores.heads import HeadsFile
from tutelage.stores.registry import Decision
from tutelage.stores.tenants import bump


@dataclass(frozen=True)
class Quarantined:
    """A version that learned from the tenant: its adapter is kept apart, and nobody is answered by it. `samples`: of the tenant;
    `others`: of all others, which the next cycle may learn from again."""

    tenant_id: str
    domain: str
    student: str
    version: int
    digest: str | None
    samples: int
    others: int


async def erase_tenant(pool: Pool, home: Home, tenant: Tenant, *, actor: str, now: datetime) -> dict[str, Any]:
    """Erase and return the signed certificate, which is also written under `audit/erasures`. May be repeated after a crash."""
    affected = await _affected(pool, tenant.id)
    rows = 0
    for one, folder in affected:
        await _quarantine(pool, one)
        _set_apart(home, one, folder)
    for folder in sorted(home.students.glob("*/v*")):
        rows += datasets.take_out(folder, tenant.id, cache=home.students / ".dvc" / "cache")
    await _forget(pool, tenant.id)
    cached = await asyncio.to_thread(_forget_replies, engines.start_valkey(home), tenant.id)
    interactions = await bodies.erase(pool, tenant.id, actor=actor)
    told = {
        "tenant_id": tenant.id,
        "at": now.isoformat(),
        "actor": actor,
        "interactions_erased": interactions,
        "cached_replies_erased": cached,
        "training_rows_erased": rows,
        "quarantined": [asdict(one) for one, _ in affected],
        "retraining": sorted({f"{one.tenant_id}/{one.domain}" for one, _ in affected if one.others}),
        "kept": ["bill", "audit chain"],
    }
    return await _certify(pool, home, told, now)


async def _affected(pool: Pool, tenant_id: str) -> list[tuple[Quarantined, Path]]:
    """Versions of the tenant's own students, and any other that has a sample of it."""
    found = []
    for version in await registry.list_versions(pool):
        counts = datasets.tenants_of(Path(version["path"]))
        if version["tenant_id"] != tenant_id and not counts[tenant_id]:
            continue
        others = sum(count for other, count in counts.items() if other != tenant_id)
        one = Quarantined(
            version["tenant_id"], version["domain"], version["student"], version["version"], version["digest"], counts[tenant_id], others
        )
        found.append((one, Path(version["path"])))
    return found


async def _quarantine(pool: Pool, one: Quarantined) -> None:
    """No pointer and no rollout may name it; its domain goes back to the version before it that is untouched, or to the teachers."""
    await registry.complete_version(pool, one.student, one.version, status="quarantined")
    await pool.execute("delete from rollouts where student = $1 and version = $2", one.student, one.version)
    now = await registry.pointer(pool, one.tenant_id, one.domain)
    if (now.student, now.version) != (one.student, one.version):
        return
    former = await registry.before(pool, one.tenant_id, one.domain, student=one.student, version=one.version)
    reason = "in quarantine: it learned from a tenant that was erased"
    decision = Decision(one.tenant_id, one.domain, "quarantine", one.student, one.version, former, reason, {})
    await registry.decide(pool, decision, expected=now.sequence)


def _set_apart(home: Home, one: Quarantined, folder: Path) -> None:
    """Weights to `quarantine/`, where no tier looks; packaged copies are deleted."""
    adapter = folder / "adapter"
    target = home.folder("quarantine") / f"{one.student}.v{one.version}"
    if adapter.exists() and not target.exists():
        shutil.copytree(adapter, target)
    shutil.rmtree(adapter, ignore_errors=True)
    for store in ("bentos", "models"):
        for packaged in (home.root / "bentoml" / store).glob(f"{one.student}*"):
            shutil.rmtree(packaged, ignore_errors=True)


async def _forget(pool: Pool, tenant_id: str) -> None:
    """What was derived from its texts: domains (centres and terms) and canaries."""
    async with pool.acquire() as connection, connection.transaction():
        for table in ("domains", "canaries"):
            await connection.execute(f"delete from {table} where tenant_id = $1", tenant_id)  # noqa: S608 - two constants
        await bump(connection)


def _forget_replies(url: str, tenant_id: str) -> int:
    """Cached replies, also from the log that Valkey replays after a crash."""
    import valkey

    with valkey.from_url(url) as client:
        kept = list(client.scan_iter(match=f"tutelage:exact:{tenant_id}:*", count=1000))
        for entry in kept:
            client.unlink(entry)
        client.bgrewriteaof()
    return len(kept)


async def _certify(pool: Pool, home: Home, told: dict[str, Any], now: datetime) -> dict[str, Any]:
    """Sign it with the home's audit key, write it, and tell its digest in the tenant's chain."""
    heads = HeadsFile.of(home)
    content = orjson.dumps(told, option=orjson.OPT_SORT_KEYS)
    signed = told | {"signature": base64.b64encode(heads.key.sign(content)).decode(), "public_key": heads.public_text}
    file = home.folder("audit") / "erasures" / f"{told['tenant_id']}-{now:%Y%m%dT%H%M%S}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(orjson.dumps(signed, option=orjson.OPT_INDENT_2) + b"\n")
    async with pool.acquire() as connection, connection.transaction():
        detail = {"certificate": file.name, "signature": signed["signature"], "quarantined": len(told["quarantined"])}
        await audit.append(
            connection, tenant_id=told["tenant_id"], actor=told["actor"], action="tenant.erase", kind="erasure", detail=detail
        )
    return signed | {"file": str(file)}
