"""Reading the traffic: domains, gaps, and the export a student learns from."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.artifacts import acreate_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.workshop import Cycle, connected, tell
from tutelage.errors import Conflict
from tutelage.evolution.canaries import Canary, blocked, drawn, key_of, rotate
from tutelage.evolution.evidence import Tally
from tutelage.evolution.gaps import EvolveSettings, Gap, measure
from tutelage.lessons import lesson
from tutelage.routing.recall import Recall, Recalled
from tutelage.scoring import matches
from tutelage.settings import ModelsSettings, RoutingSettings, load
from tutelage.stores import canaries as stored
from tutelage.stores import estimates, interactions, registry, tenants
from tutelage.stores import gaps as ledger

if TYPE_CHECKING:
    from tutelage.routing.domains import DiscoverySettings, Domain
    from tutelage.routing.revision import Change

SEED = 0
WORTH_IT = 0.03  # of a threshold or a similarity
READ_UNTIL = "read_until"  # in a domain's record: when the newest request was made that it describes
SHOWN = (
    "domain", "requests", "failure_rate", "failure_95", "escalation_rate", "cost_per_day_microusd", "learnability", "kind", "priority",
    "decision", "reason",
)  # fmt: skip


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
async def find_domains(cycle: Cycle) -> int:
    """Read what came since the last cycle into the tenant's domains and place the window's prompts in them; how many there are."""
    from tutelage.routing.domains import DiscoverySettings

    settings = load(EvolveSettings, cycle.config_dir)
    async with connected(cycle) as pool:
        rows = await interactions.read_interactions(pool, cycle.tenant_id, limit=settings.window_rows)
        if not rows:
            return 0
        tell("domains", f"reading {len(rows)} interactions")
        prompts = [_prompt(row["messages"]) for row in rows]
        embeddings = _embeddings(cycle, rows, prompts)
        records = (await registry.read_domains(pool)).get(cycle.tenant_id, [])
        served = {c.domain for c in await registry.champions(pool) if c.tenant_id == cycle.tenant_id}
        size = DiscoverySettings(min_size=settings.min_domain_size)
        found = carry_on(records, rows, prompts, embeddings, keep=served, settings=size)
        placed = [(row["request_id"], domain, vector.tobytes()) for row, domain, vector in zip(rows, found.placed, embeddings, strict=True)]
        await interactions.set_routing(pool, placed)
        read_until = max(row["created_at"] for row in rows).isoformat()
        await registry.save_domains(pool, cycle.tenant_id, [d.to_dict() | {READ_UNTIL: read_until} for d in found.domains])
    for change in found.changes:
        tell("domains", f"{change.kind} {change.name}: {change.reason}")
    sizes = Counter(domain for _, domain, _ in placed)
    tell("domains", f"{len(found.domains)} domains: " + ", ".join(f"{name or 'novel'} {n}" for name, n in sizes.most_common()))
    return len(rows)


@dataclass(frozen=True)
class Carried:
    """The domains now, the one of each request, and what changed."""

    domains: tuple[Domain, ...]
    placed: tuple[str | None, ...]
    changes: tuple[Change, ...]


def carry_on(
    records: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[str],
    embeddings: Any,
    *,
    keep: Collection[str],
    settings: DiscoverySettings,
) -> Carried:
    """A tenant's domains with its new requests read in; found from nothing once, at first.

    Clients' labels count; where they teach enough, requests without one are recognised by them, unless they resemble a domain that was
    found. What was read before is in the domains already, but for requests that belonged to none: these may form one together with new
    ones. A domain is forgotten when the window holds none of its requests and no student of `keep` serves it.
    """
    from tutelage.routing import domains, recognition, revision

    known = [domains.Domain.from_dict(record) for record in records]
    given = [row["given_domain"] for row in rows]
    index, found = domains.DomainIndex(known), {domain.name for domain in known if not domain.given}
    own = [assignment.domain in found for assignment in index.assign_all(embeddings)]
    recognised = recognition.complete(embeddings, given, least=settings.min_size, seed=SEED)
    labels = [label if one or not mine else None for one, label, mine in zip(given, recognised, own, strict=True)]
    read = [record[READ_UNTIL] for record in records if READ_UNTIL in record]
    if len(read) == len(records) > 0:
        until = datetime.fromisoformat(min(read))
        new = [place for place, row in enumerate(rows) if row["created_at"] > until or row["domain"] is None]
        some, told = [prompts[place] for place in new], [labels[place] for place in new]
        revised = revision.revise(known, embeddings[new], some, labels=told, keep=keep, seed=SEED, settings=settings)
        now, changes = revised.domains, revised.changes
    else:
        first = domains.discover(embeddings, prompts, labels=labels, seed=SEED, settings=settings)
        now, changes = tuple(domains.match(known, first, keep=keep)), ()
    names, index = {domain.name for domain in now}, domains.DomainIndex(now)
    likeliest = index.assign_all(embeddings)
    placed = tuple(
        one or (label if label in names else nearest.domain) for one, label, nearest in zip(given, labels, likeliest, strict=True)
    )
    alive = {*placed, *keep}
    return Carried(tuple(domain for domain in now if domain.name in alive), placed, changes)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
async def detect_gaps(cycle: Cycle) -> list[Gap]:
    """Where the teacher is needed often and dearly; kept in the database and shown as a table."""
    settings = load(EvolveSettings, cycle.config_dir)
    if settings.retrieval is None:
        able = any(entry.tier != "teacher" and not entry.domains for entry in load(ModelsSettings, cycle.config_dir).models)
        settings = settings.model_copy(update={"retrieval": able and load(RoutingSettings, cycle.config_dir).recall})
    async with connected(cycle) as pool:
        newest = ledger.newest(await registry.list_versions(pool), cycle.tenant_id)
        rows = await interactions.read_interactions(pool, cycle.tenant_id, limit=settings.window_rows)
        since = {domain: v["created_at"] for domain, v in newest.items()}
        traffic = await ledger.traffic(pool, cycle.tenant_id, rows=settings.window_rows, since=since, recalled=recalled(rows))
        tried = {domain: ledger.tried(v) for domain, v in newest.items()}
        spent = await ledger.trained_today(pool, cycle.tenant_id)
        gaps = measure(traffic, settings, tried=tried, spent_seconds=spent, asked=cycle.asked)
        await ledger.keep(pool, cycle.id, cycle.tenant_id, gaps)
    table = [{name: getattr(gap, name) for name in SHOWN} for gap in gaps]
    await acreate_table_artifact(key="gaps", table=table, description=f"Gaps of {cycle.tenant_name}: frequency × cost × failure")
    for gap in gaps:
        tell("gaps", f"{gap.domain}: {gap.decision}, {gap.reason}")
    return gaps


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
async def learn_estimates(cycle: Cycle) -> int:
    """Learn from outcomes how well each configured model answers which prompt, for gateways to ask before a call; from how many prompts."""
    import numpy as np

    from tutelage.routing.confidence import MIN_LABELS
    from tutelage.routing.estimates import fit

    settings = load(EvolveSettings, cycle.config_dir)
    async with connected(cycle) as pool:
        rows = await estimates.judged(pool, cycle.tenant_id, limit=settings.window_rows)
        if len(rows) < MIN_LABELS:
            return 0
        models = sorted({model for row in rows for model in row["values"]})
        outcomes = {model: [row["values"].get(model) for row in rows] for model in models}
        vectors = np.stack([np.frombuffer(row["embedding"], "f4") for row in rows])
        fitted = fit([_prompt(row["messages"]) for row in rows], vectors, [row["domain"] for row in rows], outcomes, seed=SEED)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "estimates.safetensors"
            fitted.model.save(path)
            await estimates.keep(pool, cycle.tenant_id, path.read_bytes())
    tell("estimates", f"of {', '.join(models)} from {len(rows)} judged prompts")
    return len(rows)


@task(cache_policy=NO_CACHE)
async def tune(cycle: Cycle) -> int | None:
    """Move the tenant's threshold and similarity cut-off to where what was recorded says they belong; the new version, if there is one.

    Every version empties the tenant's cache, so only what makes routing stricter, or looser by WORTH_IT, becomes one.
    """
    from tutelage.gateway.tenancy import Maker
    from tutelage.operations import tuned

    routing = load(RoutingSettings, cycle.config_dir)
    if not routing.tune:
        return None
    async with connected(cycle) as pool:
        tenant, maker = await tenants.find_tenant(pool, cycle.tenant_name), Maker(f"cycle:{cycle.id}")
        proposals = await tuned(pool, tenant, routing, apply=False, maker=maker)
        if any(p["new"] > p["old"] or p["old"] - p["new"] >= WORTH_IT for p in proposals):
            try:
                proposals = await tuned(pool, tenant, routing, apply=True, maker=maker)
            except Conflict as moved:
                tell("tune", moved.message)
    for proposal in proposals:
        tell("tune", proposal["reason"])
    return next((p["applied_as"] for p in proposals if p["applied_as"] is not None), None)


async def export(cycle: Cycle, domain: str, target: Path) -> int:
    """Write the domain's interactions, with the teacher's answers, as JSONL; how many of its requests the window holds.

    Canaries go to `canaries.jsonl` beside it, which only evaluation reads; what is one, could become one or is almost one is left out.
    """
    settings = load(EvolveSettings, cycle.config_dir)
    async with connected(cycle) as pool:
        rows = await interactions.read_interactions(pool, cycle.tenant_id, limit=settings.window_rows, for_training=True)
        # one without an embedding came while this cycle ran: the next cycle places it, and learns from it
        mine = [row for row in rows if row["domain"] == domain and row["embedding"] and not row["cache"].startswith("hit")]
        lines = [(row, line) for row in mine if (line := lesson(row, cycle.tenant_id)) is not None]
        held = await _canaries(pool, cycle, domain, [row for row, line in lines if _judges(line)], settings)
        earlier = await _earlier(pool, cycle, domain, held)
    names = {canary.key for canary in held}
    keys = [key_of(_prompt(row["messages"])) for row, _ in lines]
    near = blocked(keys, _vectors([row for row, _ in lines]), held, similar=settings.canary_similarity)
    _write(target, [line for (_, line), key, close in zip(lines, keys, near, strict=True) if not close and not drawn(key)])
    canaries = earlier | {key: line for (_, line), key in zip(lines, keys, strict=True) if key in names and _judges(line)}
    _write(target.with_name("canaries.jsonl"), list(canaries.values()))
    return len(mine)


async def _canaries(pool: Any, cycle: Cycle, domain: str, rows: Sequence[dict[str, Any]], settings: EvolveSettings) -> list[Canary]:
    """The domain's canaries of this quarter, kept."""
    today = datetime.now(UTC)
    quarter = today.year * 4 + (today.month - 1) // 3
    found = {key_of(_prompt(row["messages"])): vector for row, vector in zip(rows, _vectors(rows), strict=True)}
    candidates = [Canary(key, vector, quarter) for key, vector in found.items() if drawn(key)]
    held = rotate(await stored.read(pool, cycle.tenant_id, domain), candidates, size=settings.canaries, quarter=quarter)
    await stored.keep(pool, cycle.tenant_id, domain, held)
    return held


async def _earlier(pool: Any, cycle: Cycle, domain: str, held: Sequence[Canary]) -> dict[bytes, dict[str, Any]]:
    """The canaries' own requests by key, the newest answer to each; the window may have left them behind long ago."""
    ids = await stored.requests(pool, cycle.tenant_id, domain, held)
    rows = await interactions.read_interactions(pool, cycle.tenant_id, limit=len(ids) or 1, for_training=True, request_ids=ids)
    names = {canary.key for canary in held}
    found = [(key_of(_prompt(row["messages"])), lesson(row, cycle.tenant_id)) for row in rows]
    return {key: line for key, line in found if key in names and line is not None and _judges(line)}


def _judges(line: Mapping[str, Any]) -> bool:
    """Nobody is right for saying what a student said, whatever its tier."""
    return bool(line["metadata"]["provenance"] != "student")


def _vectors(rows: Sequence[dict[str, Any]]) -> Any:
    """Their embeddings, shape [rows, dimensions]; find_domains has set them all."""
    import numpy as np

    return np.stack([np.frombuffer(row["embedding"], "f4") for row in rows]) if rows else np.zeros((0, 0), "f4")


def _write(target: Path, lines: Sequence[dict[str, Any]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines))


def recalled(rows: Sequence[dict[str, Any]], *, most: int = 200) -> dict[str, Tally]:
    """For each domain how often the accepted answer to the most similar other request is right, asked of its newest `most` requests:
    the baseline that is tried before any training."""
    import numpy as np

    accepted: dict[str, list[tuple[Recalled, Any]]] = {}
    for row in rows:
        answer = row["feedback_label"] or (row["answer"] if row["tier"] == "teacher" and row["finish_reason"] in (None, "stop") else None)
        if answer is not None and row["domain"] and row["embedding"] and not row["cache"].startswith("hit"):
            accepted.setdefault(row["domain"], []).append(
                (Recalled(_prompt(row["messages"]), answer), np.frombuffer(row["embedding"], "f4"))
            )
    found = {}
    for domain, pairs in accepted.items():
        answers, vectors = [answer for answer, _ in pairs], np.stack([vector for _, vector in pairs])
        index = Recall(answers, vectors)
        right = tried = 0
        for place in range(max(0, len(answers) - most), len(answers)):
            nearest = index.nearest(vectors[place], most=1, but_not=place)
            tried += 1
            right += bool(nearest) and matches(nearest[0].answer, answers[place].answer)
        found[domain] = Tally(right, 0, tried - right)
    return found


def _prompt(messages: Sequence[dict[str, Any]]) -> str:
    """The text that routing looks at: the last user message, as in the gateway."""
    for message in reversed(messages):
        if message["role"] == "user":
            content = message.get("content") or ""
            return content if isinstance(content, str) else "\n".join(part.get("text") or "" for part in content)
    return "\n".join(str(message.get("content") or "") for message in messages)


def _embeddings(cycle: Cycle, rows: Sequence[dict[str, Any]], prompts: Sequence[str]) -> Any:
    """One for each prompt, shape [rows, dimensions]; computed where neither the gateway nor an earlier cycle has, equal prompts once."""
    import numpy as np

    fresh = list(dict.fromkeys(prompt for row, prompt in zip(rows, prompts, strict=True) if not row["embedding"]))
    made = dict(zip(fresh, _embed(cycle, fresh), strict=True)) if fresh else {}
    return np.stack(
        [np.frombuffer(row["embedding"], "f4") if row["embedding"] else made[prompt] for row, prompt in zip(rows, prompts, strict=True)]
    )


def _embed(cycle: Cycle, prompts: list[str]) -> Any:
    from tutelage.routing.encoder import Encoder

    return Encoder(cycle.state.models / "encoder", threads=int(os.environ.get("OMP_NUM_THREADS") or 2)).encode(prompts)
