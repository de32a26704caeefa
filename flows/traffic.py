"""Reading the traffic: domains, gaps, and the export a student learns from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import acreate_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.workshop import Cycle, connected, tell
from tutelage.evolution.gaps import EvolveSettings, Gap, Traffic, measure
from tutelage.lessons import lesson
from tutelage.settings import load
from tutelage.stores import interactions, registry

SEED = 0


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
async def find_domains(cycle: Cycle) -> int:
    """Sort the window's prompts into domains, keeping the names of domains that are still there; how many interactions there are."""
    from tutelage.routing import domains

    settings = load(EvolveSettings, cycle.config_dir)
    async with connected(cycle) as pool:
        rows = await interactions.read_interactions(pool, cycle.tenant_id, limit=settings.window_rows)
        if not rows:
            return 0
        tell("domains", f"reading {len(rows)} interactions")
        prompts = [_prompt(row["messages"]) for row in rows]
        embeddings = _embed(cycle, prompts)
        known = [domains.Domain.from_dict(r) for r in (await registry.read_domains(pool)).get(cycle.tenant_id, [])]
        labels = [row["given_domain"] for row in rows]
        size = domains.DiscoverySettings(min_size=settings.min_domain_size)
        found = domains.discover(embeddings, prompts, labels=labels, seed=SEED, settings=size)
        served = {c.domain for c in await registry.champions(pool) if c.tenant_id == cycle.tenant_id}
        found = domains.match(known, found, keep=served)
        index = domains.DomainIndex(found)
        placed = [
            (row["request_id"], row["given_domain"] or index.assign(vector).domain, vector.tobytes())
            for row, vector in zip(rows, embeddings, strict=True)
        ]
        await interactions.set_routing(pool, placed)
        await registry.save_domains(pool, cycle.tenant_id, [domain.to_dict() for domain in found])
    sizes = Counter(domain for _, domain, _ in placed)
    tell("domains", f"{len(found)} domains: " + ", ".join(f"{name or 'novel'} {n}" for name, n in sizes.most_common()))
    return len(rows)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
async def detect_gaps(cycle: Cycle) -> list[Gap]:
    """Where the teacher is needed often and dearly; kept in the database and shown as a table."""
    settings = load(EvolveSettings, cycle.config_dir)
    async with connected(cycle) as pool:
        rows = await interactions.read_interactions(pool, cycle.tenant_id, limit=settings.window_rows)
        newest = _judged(await registry.list_versions(pool), cycle.tenant_id)
        traffic = _count(rows, {domain: v["created_at"] for domain, v in newest.items()})
        trained_on = {domain: int((v["evidence"] or {}).get("requests", 0)) for domain, v in newest.items()}
        gaps = measure(traffic, settings, trained_on=trained_on)
        fields = ("domain", "requests", "failure_rate", "cost_microusd", "priority", "decision", "reason")
        table = [{name: getattr(gap, name) for name in fields} for gap in gaps]
        await registry.save_gaps(pool, [(cycle.id, cycle.tenant_id, *row.values()) for row in table])
    await acreate_table_artifact(key="gaps", table=table, description=f"Gaps of {cycle.tenant_name}: frequency × cost × failure")
    for gap in gaps:
        tell("gaps", f"{gap.domain}: {gap.decision}, {gap.reason}")
    return gaps


async def export(cycle: Cycle, domain: str, target: Path) -> int:
    """Write the domain's interactions, with the teacher's answers, as JSONL; how many of its requests the window holds."""
    settings = load(EvolveSettings, cycle.config_dir)
    async with connected(cycle) as pool:
        rows = await interactions.read_interactions(pool, cycle.tenant_id, limit=settings.window_rows, for_training=True)
    mine = [row for row in rows if row["domain"] == domain and not row["cache"].startswith("hit")]
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w") as file:
        for row in mine:
            line = lesson(row, cycle.tenant_id)
            if line is not None:
                file.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")
    return len(mine)


def _judged(versions: Sequence[dict[str, Any]], tenant_id: str) -> dict[str, dict[str, Any]]:
    """The newest version of each domain that a gate has judged. One still "training" when a cycle begins was left by a cycle that was
    cut off: nothing was learned from it, so its requests are there to learn from."""
    return {v["domain"]: v for v in versions if v["tenant_id"] == tenant_id and v["status"] != "training"}


def _count(rows: Sequence[dict[str, Any]], since: dict[str, Any]) -> list[Traffic]:
    known: Counter[str] = Counter()
    requests: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    cost: Counter[str] = Counter()
    for row in rows:
        domain = row["domain"]
        if domain is None or row["cache"].startswith("hit"):
            continue
        known[domain] += 1
        if domain in since and row["created_at"] <= since[domain]:
            continue
        requests[domain] += 1
        cost[domain] += row["cost_microusd"]
        wrong = row["feedback_score"] is not None and row["feedback_score"] < 0.5
        failed[domain] += row["tier"] == "teacher" or wrong
    return [Traffic(domain, known[domain], requests[domain], failed[domain], cost[domain]) for domain in sorted(known)]


def _prompt(messages: Sequence[dict[str, Any]]) -> str:
    """The text that routing looks at: the last user message, as in the gateway."""
    for message in reversed(messages):
        if message["role"] == "user":
            content = message.get("content") or ""
            return content if isinstance(content, str) else "\n".join(part.get("text") or "" for part in content)
    return "\n".join(str(message.get("content") or "") for message in messages)


def _embed(cycle: Cycle, prompts: list[str]) -> Any:
    from tutelage.routing.encoder import Encoder

    return Encoder(cycle.state.models / "encoder", threads=2).encode(prompts)
