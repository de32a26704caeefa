"""What operators ask and change: tenants, keys, students, gaps, spend. Works with or without a running `serve`.

It refuses to print; every operation returns rows or one record.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from tutelage import erasure, gaps, lineage
from tutelage.errors import AuditBroken, InvalidRequest
from tutelage.evolution.gaps import EvolveSettings
from tutelage.fleet import engines, processes
from tutelage.gateway import limits, tenancy
from tutelage.gateway.limits import Agreement, Limits
from tutelage.gateway.snapshot import in_force
from tutelage.gateway.tenancy import Maker, Scope
from tutelage.lessons import lesson
from tutelage.records import Key, Tenant
from tutelage.routing import tuning
from tutelage.routing.judge import unbiased
from tutelage.settings import Home, RoutingSettings, load
from tutelage.stores import audit, bodies, interactions, outcomes, policies, registry, tenants, usage
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.heads import HeadsExporter, HeadsFile

Result = list[dict[str, Any]] | dict[str, Any]
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MOST_LESSONS = 1_000_000
MOST_TIME = timedelta(days=36_500)
MOST_LOGGED = 20_000  # newest requests that a change is decided on
BY_ITSELF = Maker(tenants.SYSTEM)


@contextmanager
def database(home: Home) -> Iterator[str]:
    """This home's database URL; an embedded server started for the occasion is stopped again, unless a `serve` took it over."""
    was_running = engines.running_database(home)
    url = engines.start_database(home)
    try:
        yield url
    finally:
        if not was_running and engines.running_database(home) and processes.find(home, "serve") is None:
            engines.stop(home)


def run(home: Home, operation: str, arguments: argparse.Namespace) -> Result:
    """Run one operation by name. Raises TutelageError subclasses with a message for the operator."""

    async def connected(url: str) -> Result:
        pool = await open_pool(url, size=1)
        try:
            return await OPERATIONS[operation](pool, home, arguments)
        finally:
            await pool.close()

    with database(home) as url:
        return asyncio.run(connected(url))


async def create_tenant(pool: Pool, home: Home, arguments: argparse.Namespace) -> Result:
    return await add_tenant(pool, home.secret("pepper"), name=arguments.name, tier=arguments.tier, maker=by_hand())


async def add_tenant(pool: Pool, pepper: str, *, name: str, tier: str, maker: Maker = BY_ITSELF) -> dict[str, Any]:
    """A new tenant and its first key."""
    tenant, made = await tenancy.create_tenant(pool, pepper, Tenant("", name, tier), maker=maker, now=datetime.now(UTC))
    return {"tenant_id": tenant.id, "key_id": made.key.id, "key": made.text}


def by_hand() -> Maker:
    """Whoever sits at the command line: the owner of the home's files, whom no key binds."""
    return Maker(f"cli:{getpass.getuser()}")


async def list_tenants(pool: Pool, _home: Home, _arguments: argparse.Namespace) -> Result:
    return [asdict(tenant) for tenant in await tenants.list_tenants(pool)]


async def change_tenant(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    """Suspend or resume a tenant, move it to another tier, agree other limits, choose what is kept and what a client that leaves does."""
    tenant = await tenants.find_tenant(pool, arguments.name)
    changes: dict[str, Any] = {} if arguments.limit is None else {"limits": _limits(arguments.limit, Agreement)}
    for column in ("status", "tier", "on_disconnect", "bodies", "strategy", "training"):
        if getattr(arguments, column, None) is not None:
            changes[column] = getattr(arguments, column)
    if getattr(arguments, "retention_days", None) is not None:
        changes["retention_days"] = _days(arguments.retention_days)
    if getattr(arguments, "cache_seconds", None) is not None:
        changes["cache_seconds"] = _seconds(arguments.cache_seconds)
    if getattr(arguments, "semantic_error_budget", None) is not None:
        changes["semantic_error_budget"] = _share(arguments.semantic_error_budget)
    if getattr(arguments, "max_cost_usd", None) is not None:
        changes["max_cost_microusd"] = _microusd(arguments.max_cost_usd)
    if getattr(arguments, "min_confidence", None) is not None:
        changes["min_confidence"] = _least(arguments.min_confidence)
    changed = await tenancy.change_tenant(pool, tenant, changes, maker=by_hand())
    in_force = {**limits.agreed(changed.tier, changed.limits).model_dump(), **limits.holdings(changed.tier, changed.limits).model_dump()}
    return {**asdict(changed), "limits": in_force}


async def delete_tenant(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    """End its keys and erase its texts; the bill and the chain stay."""
    tenant = await tenants.find_tenant(pool, arguments.name)
    erased = await tenancy.delete_tenant(pool, tenant, maker=by_hand(), now=datetime.now(UTC))
    return {"tenant_id": tenant.id, "name": tenant.name, "deleted": True, "interactions_erased": erased}


def _limits(given: Sequence[str], kind: type[Limits] = Limits) -> dict[str, Any]:
    """`NAME=NUMBER` or `NAME=none` as limits. Raises InvalidRequest."""
    found: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        found[name] = None if value == "none" else int(value) if value.isdecimal() else value
    return limits.check(found, kind)


def _days(text: str) -> int | None:
    """Days to keep; None: for ever. Raises InvalidRequest."""
    if text == "none":
        return None
    if not re.fullmatch(r"[1-9]\d{0,4}", text):
        raise InvalidRequest(f"--retention-days {text!r}: a whole number of days is expected, such as 30, or none to keep for ever")
    return int(text)


def _seconds(text: str) -> int | None:
    """How long answers are kept; None: as long as the gateway says. Raises InvalidRequest."""
    if text == "none":
        return None
    if not re.fullmatch(r"\d{1,8}", text):
        raise InvalidRequest(f"--cache-seconds {text!r}: seconds are expected, such as 3600, 0 to keep nothing, or none for the default")
    return int(text)


def _share(text: str) -> float | None:
    """The share of answers to paraphrases that may be wrong; None: as much as the gateway says. Raises InvalidRequest."""
    if text == "none":
        return None
    if not re.fullmatch(r"0(\.\d{1,6})?", text) or float(text) > 0.5:
        raise InvalidRequest(
            f"--semantic-error-budget {text!r}: a share up to 0.5 is expected, such as 0.05, 0 for off, or none for the default"
        )
    return float(text)


def _microusd(text: str) -> int | None:
    """What one answer may cost; None: whatever it costs. Raises InvalidRequest."""
    if text == "none":
        return None
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text) or not float(text):
        raise InvalidRequest(f"--max-cost-usd {text!r}: US dollars are expected, such as 0.005, or none")
    return round(float(text) * 1e6)


def _least(text: str) -> float | None:
    """The least quality that answers are promised; None: none is stated. Raises InvalidRequest."""
    if text == "none":
        return None
    if not re.fullmatch(r"(0(\.\d{1,6})?|1(\.0{1,6})?)", text) or not float(text):
        raise InvalidRequest(f"--min-confidence {text!r}: a number above 0 and at most 1 is expected, such as 0.9, or none")
    return float(text)


async def list_policies(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    """Every version, newest first."""
    named = [await tenants.find_tenant(pool, arguments.tenant)] if arguments.tenant else await tenants.list_tenants(pool)
    rows = [row for tenant in named for row in await policies.history(pool, tenant.id)]
    return [{name: value for name, value in row.items() if name != "evidence"} for row in rows]


async def show_policy(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    tenant = await tenants.find_tenant(pool, arguments.tenant)
    held = max((row["version"] for row in await policies.history(pool, tenant.id)), default=0)
    version = held if arguments.version is None else arguments.version
    if version == 0:
        return {"tenant_id": tenant.id, "version": 0, "reason": "as configured in routing.yaml", "settings": {}, "holds": held == 0}
    return {**await policies.find(pool, tenant.id, version), "holds": version == held}


async def revert_policy(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    tenant = await tenants.find_tenant(pool, arguments.tenant)
    return await tenancy.revert_policy(pool, tenant, arguments.version, reason=arguments.reason, maker=by_hand())


async def tune_policy(pool: Pool, home: Home, arguments: argparse.Namespace) -> Result:
    """What the recorded requests say of the tenant's cuts; applied if asked for, as one new version."""
    tenant = await tenants.find_tenant(pool, arguments.tenant)
    routing = load(RoutingSettings, home.config_dir(arguments.config))
    return await tuned(pool, tenant, routing, apply=arguments.apply, maker=by_hand())


async def tuned(pool: Pool, tenant: Tenant, routing: RoutingSettings, *, apply: bool, maker: Maker) -> list[dict[str, Any]]:
    """A proposal for each cut, and the version that it became where it was applied."""
    held = (await policies.active(pool)).get(tenant.id, {"version": 0, "settings": {}})
    policy = in_force(held["version"], held["settings"], routing)
    tries = [tuning.Try(**_counted(row, routing)) for row in await outcomes.tries(pool, tenant.id, limit=MOST_LOGGED)]
    choices = [tuning.Choice(**_counted(row, routing)) for row in await outcomes.choices(pool, tenant.id, limit=MOST_LOGGED)]
    proposals = [
        tuning.propose_threshold(tries, old=policy.threshold, floor=routing.explore_floor, promised_loss=routing.promised_loss),
        tuning.propose_similarity(choices, old=policy.similarity, promised_loss=routing.promised_loss),
    ]
    changes = [proposal for proposal in proposals if proposal.changes]
    version = None
    if apply and changes:
        row = await policies.append(
            pool,
            tenant.id,
            {**held["settings"], **{change.setting: change.new for change in changes}},
            reason="; ".join(change.reason for change in changes),
            evidence={change.setting: change.evidence for change in changes},
            actor=maker.actor,
            expected=held["version"],
        )
        version = row["version"]
    return [{"tenant_id": tenant.id, **asdict(proposal), "applied_as": version if proposal.changes else None} for proposal in proposals]


def _counted(row: dict[str, Any], routing: RoutingSettings) -> dict[str, Any]:
    """A recorded row, a judge's verdict counted by how often the judge is right."""
    told = {name: value for name, value in row.items() if name != "judged"}
    if not row["judged"] or routing.judge is None:
        return told
    rates = {"sensitivity": routing.judge.sensitivity, "specificity": routing.judge.specificity}
    return told | {"value": unbiased(row["value"], **rates)}


async def create_key(pool: Pool, home: Home, arguments: argparse.Namespace) -> Result:
    if bool(arguments.tenant) == bool(arguments.operator):
        raise InvalidRequest("give a tenant, or --operator ROLE, and not both: tutelage keys create TENANT")
    tenant_id = (await tenants.find_tenant(pool, arguments.tenant)).id if arguments.tenant else None
    now = datetime.now(UTC)
    ends = now + _duration("--expires", arguments.expires) if arguments.expires else None
    role = arguments.operator or getattr(arguments, "role", None)
    scope = Scope(role, arguments.models, getattr(arguments, "routes", None), _limits(arguments.limit or []), ends)
    made = await tenancy.create_key(pool, home.secret("pepper"), tenant_id, scope, maker=by_hand(), now=now)
    return {**_scopes(made.key), "key": made.text}


def _scopes(key: Key) -> dict[str, Any]:
    return {
        "tenant_id": key.tenant_id, "role": key.role, "key_id": key.id, "expires_at": key.expires_at, "models": key.models,
        "routes": key.routes, "limits": dict(key.limits),
    }  # fmt: skip


def _duration(option: str, text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if match is None:
        raise InvalidRequest(f"{option} {text!r}: a number and one of s, m, h, d is expected, such as 1h")
    length = timedelta(seconds=int(match[1]) * UNITS[match[2]])
    if length > MOST_TIME:
        raise InvalidRequest(f"{option} {text!r}: at most {MOST_TIME.days}d is allowed")
    return length


async def rotate_key(pool: Pool, home: Home, arguments: argparse.Namespace) -> Result:
    old, overlap = await tenants.find_key(pool, arguments.key_id), _duration("--overlap", arguments.overlap)
    made, ended = await tenancy.rotate_key(pool, home.secret("pepper"), old, overlap=overlap, maker=by_hand(), now=datetime.now(UTC))
    return {
        "tenant_id": old.tenant_id, "key_id": made.key.id, "key": made.text, "old_key_id": old.id, "old_key_ends": str(ended.expires_at),
    }  # fmt: skip


async def revoke_key(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    key = await tenancy.revoke_key(pool, arguments.key_id, maker=by_hand(), now=datetime.now(UTC))
    return {"key_id": key.id, "revoked_at": str(key.revoked_at)}


async def list_keys(pool: Pool, _home: Home, _arguments: argparse.Namespace) -> Result:
    return [{k: v for k, v in asdict(key).items() if k != "hash"} for key in await tenants.list_keys(pool)]


async def list_students(pool: Pool, _home: Home, _arguments: argparse.Namespace) -> Result:
    shown = ("tenant_id", "domain", "student", "version", "status", "awaits", "digest", "mlflow_version", "bento", "teachers", "reason")
    return [{name: row[name] for name in shown} for row in await registry.list_versions(pool)]


async def list_promotions(pool: Pool, _home: Home, _arguments: argparse.Namespace) -> Result:
    return await registry.list_promotions(pool)


async def list_gaps(pool: Pool, home: Home, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the traffic shows just now, by what a second of training is expected to save; a cycle decides by the same rule."""
    settings = load(EvolveSettings, home.config_dir(getattr(arguments, "config", None)))
    return await gaps.now(pool, settings, [tenant.id for tenant in await tenants.list_tenants(pool)])


async def check_proposed(pool: Pool, home: Home, arguments: argparse.Namespace) -> Result:
    """The named gaps of a tenant. Raises InvalidRequest where one is unknown or not worth a student, telling why."""
    tenant = await tenants.find_tenant(pool, arguments.tenant)
    known = {row["domain"]: row for row in await list_gaps(pool, home, arguments) if row["tenant_id"] == tenant.id and row["domain"]}
    for domain in arguments.domain:
        if domain not in known:
            raise InvalidRequest(f"{tenant.name} has no domain {domain!r}; it has: {', '.join(known) or 'none yet'}")
        if known[domain]["decision"] not in ("propose", "train"):
            raise InvalidRequest(f"{domain} is not worth a student now: {known[domain]['reason']}")
    return [known[domain] for domain in arguments.domain]


async def write_lessons(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    """A tenant's recorded answers as rows of distillation data, in `arguments.data`. Raises InvalidRequest when it opted out."""
    tenant = await tenants.find_tenant(pool, arguments.tenant)
    if tenant.training == "off":
        raise InvalidRequest(f"{tenant.name} wants nothing learned from its traffic; nothing was exported")
    rows = await interactions.read_interactions(pool, tenant.id, limit=MOST_LESSONS, for_training=True)
    told = [lesson(row, tenant.id) for row in rows if arguments.domain in (None, row["domain"]) and not row["cache"].startswith("hit")]
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in told if row is not None]
    Path(arguments.data).write_text("".join(lines))  # noqa: ASYNC240 - nothing else runs in this process
    return {"rows": len(lines)}


async def list_usage(pool: Pool, _home: Home, _arguments: argparse.Namespace) -> Result:
    return await usage.report(pool, usage.Question())


async def status(pool: Pool, home: Home, _arguments: argparse.Namespace) -> Result:
    """One record: what runs, who answers which domain, the newest gaps, what was spent."""
    running = [name for name in processes.names(home) if processes.find(home, name)] + ["postgres"]
    champions = [
        {"tenant_id": c.tenant_id, "domain": c.domain, "student": c.student, "version": c.version, "tier": c.tier}
        for c in await registry.champions(pool)
    ]
    return {
        "home": str(home.root),
        "running": ", ".join(running),
        "tiers": champions,
        "students": await list_students(pool, home, _arguments),
        "gaps": await list_gaps(pool, home, _arguments),
        "spend": await interactions.spend(pool, None),
    }


async def verify_audit(pool: Pool, home: Home, arguments: argparse.Namespace) -> Result:
    """Check one chain or all, against the heads exported before (of this home, or a copy kept elsewhere), and against the ledger.

    Raises:
        AuditBroken: at the first break, saying whose chain, where and how.
    """
    own = HeadsFile.of(home)
    exported = (replace(own, path=Path(arguments.heads)) if arguments.heads else own).read()
    chain = await _chain(pool, arguments.tenant)
    total = await audit.count_links(pool, chain)
    with Progress(console=Console(stderr=True), transient=True, disable=arguments.json or not sys.stderr.isatty()) as progress:
        bar = progress.add_task("checking links", total=total)
        checked, broken = await audit.verify(pool, exported, tenant_id=chain, seen=lambda links: progress.advance(bar, links))
    if broken is not None:
        where = f"link {broken.sequence}" if broken.sequence is not None else "the ledger"
        raise AuditBroken(f"the chain of {broken.tenant_id or 'the installation'} is broken at {where}: {broken.reason}")
    heads = sum(len(known) for known in exported.values())
    return {"whole": True, "links": checked, "exported_heads": heads}


async def _chain(pool: Pool, named: str | None) -> str | None:
    """The id of a tenant, a deleted one by its id too; None: all. Raises NotFound."""
    if named is None:
        return None
    everybody = await tenants.list_tenants(pool, deleted=True)
    return named if any(named == tenant.id for tenant in everybody) else (await tenants.find_tenant(pool, named)).id


async def list_audit(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    """The newest links of a tenant's chain, or of the installation's own."""
    chain = await _chain(pool, arguments.tenant) or audit.OPERATOR
    rows = await audit.newest(pool, chain, limit=arguments.limit)
    shown = ("sequence", "at", "kind", "actor", "action", "subject", "detail")
    return rows if arguments.json else [{name: row[name] for name in shown} for row in rows]


async def export_audit(pool: Pool, home: Home, arguments: argparse.Namespace) -> Result:
    """Write chains as JSON lines, a link a line, and beside them their signed heads as of now."""
    chain = await _chain(pool, arguments.tenant)
    file = HeadsFile.of(home)
    await HeadsExporter(pool, file, seconds=0).export()
    chains = [head.tenant_id for head in await audit.heads(pool) if chain in (None, head.tenant_id)]
    links = 0
    with Path(arguments.file).open("w") as out:  # noqa: ASYNC230 - nothing else runs in this process
        for tenant_id in chains:
            async for link in audit.links(pool, tenant_id):
                out.write(json.dumps({**asdict(link), "hash": link.hash.hex()}, ensure_ascii=False) + "\n")
                links += 1
    return {"file": arguments.file, "links": links, "heads": str(file.path), "public_key": file.public_text}


async def erase_tenant(pool: Pool, home: Home, arguments: argparse.Namespace) -> Result:
    """Erase everything of a tenant and put in quarantine what learned from it; the certificate."""
    tenant = await tenants.find_tenant(pool, arguments.name)
    return await erasure.erase_tenant(pool, home, tenant, actor=by_hand().actor, now=datetime.now(UTC))


async def trace(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    """From an answer to the requests it was learned from."""
    return await lineage.trace(pool, arguments.request_id)


async def erase(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    """Erase what a tenant asked and was answered: one request, all before a day, or all."""
    if sum(map(bool, (arguments.request, arguments.before, arguments.all))) != 1:
        raise InvalidRequest("say what to erase: --request ID, --before DAY (such as 2026-11-01, UTC) or --all")
    tenant = await tenants.find_tenant(pool, arguments.tenant)
    try:
        before = datetime.strptime(arguments.before, "%Y-%m-%d").replace(tzinfo=UTC) if arguments.before else None
    except ValueError as wrong:
        raise InvalidRequest(f"--before {arguments.before!r}: a day is expected, such as 2026-11-01") from wrong
    erased = await bodies.erase(pool, tenant.id, actor=by_hand().actor, request_id=arguments.request, before=before)
    return {"tenant_id": tenant.id, "interactions_erased": erased}


OPERATIONS: dict[str, Callable[[Pool, Home, argparse.Namespace], Awaitable[Result]]] = {
    "create_tenant": create_tenant,
    "tenants": list_tenants,
    "change_tenant": change_tenant,
    "delete_tenant": delete_tenant,
    "policies": list_policies,
    "policy": show_policy,
    "revert_policy": revert_policy,
    "tune_policy": tune_policy,
    "create_key": create_key,
    "rotate_key": rotate_key,
    "revoke_key": revoke_key,
    "keys": list_keys,
    "students": list_students,
    "promotions": list_promotions,
    "gaps": list_gaps,
    "check_proposed": check_proposed,
    "lessons": write_lessons,
    "usage": list_usage,
    "status": status,
    "verify_audit": verify_audit,
    "list_audit": list_audit,
    "export_audit": export_audit,
    "erase": erase,
    "erase_tenant": erase_tenant,
    "lineage": trace,
}
