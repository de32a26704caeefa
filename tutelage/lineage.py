"""From an answer to what it learned from: model version → adapter digest → dataset manifest → samples → source requests and tenants.

Reads only. It refuses to know how a version was trained; it follows what recording, gate and training wrote down.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tutelage.errors import NotFound
from tutelage.stores import datasets
from tutelage.stores.database import Pool

ANSWERED = """
    select i.request_id, i.tenant_id, i.created_at, i.model, i.tier, i.route, i.cache, i.domain, i.confidence,
        (select a.digest from attempts a where a.request_id = i.request_id and a.accepted order by position limit 1) as digest
    from interactions i where i.request_id = $1
"""
BY_DIGEST = "select * from versions where student = $1 and digest = $2 order by version desc limit 1"
# a reply from the cache names no attempt: the version in charge at that time gave it, for no other's answers are kept
IN_CHARGE = """
    select v.* from promotions p join versions v on v.student = p.champion_student and v.version = p.champion_version
    where p.tenant_id = $1 and p.champion_student = $2 and p.created_at <= $3 order by p.created_at desc, p.sequence desc limit 1
"""


async def trace(pool: Pool, request_id: str) -> dict[str, Any]:
    """The whole chain of one answer; of a model that is not a student it ends with the model's name.

    Raises:
        NotFound: no such interaction.
    """
    answered = await pool.fetchrow(ANSWERED, request_id)
    if answered is None:
        raise NotFound(f"no interaction {request_id!r}; use the x-request-id of a reply", param="request_id")
    told = {name: answered[name] for name in ("request_id", "tenant_id", "created_at", "domain", "tier", "model", "route", "cache")}
    version = await pool.fetchrow(BY_DIGEST, answered["model"], answered["digest"]) if answered["digest"] else None
    if version is None:
        version = await pool.fetchrow(IN_CHARGE, answered["tenant_id"], answered["model"], answered["created_at"])
    if version is None:
        return {**told, "complete": True, "reason": f"{answered['model']} is no student of ours: the chain ends with it", "samples": []}
    dataset = datasets.read(Path(version["path"]))
    manifest = dataset.manifest
    return {
        **told,
        "student": version["student"],
        "version": version["version"],
        "status": version["status"],
        "adapter_digest": version["digest"],
        "base_fingerprint": version["base_fingerprint"],
        "mlflow_version": version["mlflow_version"],
        "bento": version["bento"],
        "cycle": version["cycle_id"],
        "data_digest": manifest.get("data_digest"),
        "template_hash": manifest.get("template_hash"),
        "seed": manifest.get("seed"),
        "complete": dataset.whole and manifest.get("adapter_digest") == version["digest"],
        "reason": dataset.reason,
        "tenants": dict(Counter(sample.tenant_id for sample in dataset.samples)),
        "samples": [sample._asdict() for sample in dataset.samples],
    }
