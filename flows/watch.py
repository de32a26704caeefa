"""The watch over what serves: new outcomes become evidence (`intake`), rollouts go on or stop, champions that got worse are rolled back.

    python -m flows.watch [--every SECONDS] [--once] [--config DIR]

Rules are `tutelage.evolution`'s; here they take effect. It needs no Prefect: a rollback must not wait for a scheduler. A rollback is one
new line of the promotion ledger: the version before is held warm by the tier, and cached answers of the one that left are none any more.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from flows.beside import command, looking
from flows.intake import Taught, take_in
from flows.workshop import tell
from tutelage.errors import PromotionConflict
from tutelage.evolution.canaries import inflated
from tutelage.evolution.evidence import Tally
from tutelage.evolution.promotion import PromotionSettings, Verdict, compared, confirmed, demote, good_enough
from tutelage.evolution.rollout import Rollout as Going
from tutelage.evolution.rollout import RolloutSettings, Step, step
from tutelage.evolution.watch import WatchSettings
from tutelage.settings import Home, RoutingSettings, load
from tutelage.stores import evidence as standing
from tutelage.stores import registry
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.evidence import Rollout, Version
from tutelage.stores.registry import Action, Champion, Decision, Pointer

EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class Rules:
    promotion: PromotionSettings
    rollout: RolloutSettings
    watch: WatchSettings
    share: float = RoutingSettings().shadow  # of requests, the even sample of comparisons with the teacher

    @classmethod
    def read(cls, config_dir: Path) -> Rules:
        share = load(RoutingSettings, config_dir).shadow
        return cls(load(PromotionSettings, config_dir), load(RolloutSettings, config_dir), load(WatchSettings, config_dir), share)


async def look(pool: Pool, rules: Rules, taught: Taught | None = None) -> list[str]:
    """One look at every tenant; what was decided, a line each. `taught`: what is known from earlier looks of versions' data."""
    taught = taught or Taught()
    champions, rollouts = await registry.champions(pool), await standing.rollouts(pool)
    told: list[str] = []
    for tenant_id in sorted({c.tenant_id for c in champions}):
        mine = {c.domain: c for c in champions if c.tenant_id == tenant_id}
        going = {r.domain: r for r in rollouts if r.tenant_id == tenant_id}
        try:
            await take_in(pool, tenant_id, mine, going, rules.watch, share=rules.share, taught=taught)
            for domain, rollout in going.items():
                told += await _go_on(pool, rollout, mine.get(domain), rules)
            for champion in mine.values():
                told += await _hold(pool, champion, rules)
        except PromotionConflict as elsewhere:  # a cycle or another watch was quicker; the next look sees what is there then
            told.append(elsewhere.message)
    return told


async def _go_on(pool: Pool, rollout: Rollout, champion: Champion | None, rules: Rules) -> list[str]:
    """The challenger's next step, if the evidence allows or demands one."""
    version = (rollout.student, rollout.version)
    if champion is not None and (champion.student, champion.version) == version:  # a crash came between the ledger and what follows
        return await _took_over(pool, rollout)
    counts = await standing.read(pool, version)
    facts = await _facts(pool, version)
    prices = await standing.prices(pool, [facts["digest"], champion.digest if champion else ""])
    pairs = counts.get("pairs", Tally()) + counts.get("shadow-pairs", Tally())
    comparison = compared(
        pairs, domain=rollout.domain, price=prices.get(facts["digest"], 0.0),
        champion_price=prices.get(champion.digest, 0.0) if champion else 0.0,
    )  # fmt: skip
    doubt = inflated(counts.get("held-out", Tally()), counts.get("live", Tally()))
    if doubt.alarm:
        taken = Step("stop", 0, f"contaminated: {doubt.reason}")
    else:
        number, passed = await standing.enrol(pool, *version, "champion", year=datetime.now(UTC).year)
        needed = rules.promotion.needed(number, passed)
        taken = step(Going(rollout.percent, comparison, counts.get("stage", Tally())), rules.rollout, rules.promotion, needed=needed)
    if taken.action == "stay":
        return []
    now = await registry.pointer(pool, rollout.tenant_id, rollout.domain)
    champion_after = Pointer(now.sequence + 1, rollout.student, rollout.version, rollout.tier) if taken.action == "promote" else now
    evidence = {name: vars(tally) for name, tally in counts.items()} | {"percent": taken.percent}
    action: Action = taken.action
    await _decide(pool, rollout.tenant_id, rollout.domain, action, version, champion_after, taken.reason, evidence, now)
    told = [f"{rollout.student} v{rollout.version}: {taken.action}, {taken.reason}"]
    if taken.action == "promote":
        return told + await _took_over(pool, rollout)
    if taken.action == "stop":
        await registry.complete_version(pool, *version, status="refused", awaits=None)
    await standing.move_rollout(pool, rollout, percent=taken.percent)
    return told


async def _took_over(pool: Pool, rollout: Rollout) -> list[str]:
    """What follows the ledger's line that made the challenger the champion."""
    await standing.mark_passed(pool, rollout.student, rollout.version, "champion")
    await registry.complete_version(pool, rollout.student, rollout.version, status=rollout.tier)
    await standing.move_rollout(pool, rollout, percent=100)
    return [f"{rollout.student} v{rollout.version}: answers {rollout.domain}"]


async def _hold(pool: Pool, champion: Champion, rules: Rules) -> list[str]:
    """Roll a champion back at an alarm, demote it at the evidence for that, promote it when its tier's next floors are cleared."""
    version = (champion.student, champion.version)
    now = await registry.pointer(pool, champion.tenant_id, champion.domain)
    if (now.student, now.version) != version:
        return []
    alarms = [watched for watched, _ in (await standing.watches(pool, version)).values() if watched.alarm]
    if alarms:
        former = await registry.before(pool, champion.tenant_id, champion.domain, student=champion.student, version=champion.version)
        reason = f"rolled back to {former.student or 'the teachers'}: {alarms[0].reason}"
        await registry.complete_version(pool, *version, status="refused", awaits=None)
        await _decide(pool, champion.tenant_id, champion.domain, "rollback", version, former, reason, {}, now)
        return [f"{champion.student} v{champion.version}: {reason}"]
    counts = await standing.read(pool, version)
    return await _change_tier(pool, champion, counts, now, rules.promotion)


async def _change_tier(pool: Pool, champion: Champion, counts: Mapping[str, Tally], now: Pointer, settings: PromotionSettings) -> list[str]:
    """Up or down the ladder by what it showed."""
    version, shown = (champion.student, champion.version), counts.get("live", Tally()) + counts.get("shadow", Tally())
    verdict = demote(champion.tier, shown, settings)
    tier, reason, action = verdict.tier, verdict.reason, verdict.action
    if action == "keep":
        higher: Literal["ta", "teacher"] | None = {"student": "ta", "ta": "teacher"}.get(champion.tier)  # type: ignore[assignment]
        facts = await _facts(pool, version)
        if higher is None or facts["awaits"] == higher or not shown.n:
            return []
        number, passed = await standing.enrol(pool, *version, higher, year=datetime.now(UTC).year)
        confidence = float(facts["evidence"].get("confidence") or 0.0)
        finding = good_enough(shown, confidence, settings.floors(higher), needed=settings.needed(number, passed))
        if not finding.passed:
            return []
        await standing.mark_passed(pool, *version, higher)
        verdict = confirmed(Verdict("promote", higher, finding.reason), settings.approval)
        if verdict.awaits is not None:
            return await _wait(pool, champion, verdict, counts, now)
        tier, reason, action = higher, finding.reason, "promote"
    if tier is None or action not in ("promote", "demote"):
        return []
    after = Pointer(now.sequence + 1, champion.student, champion.version, tier)
    await _decide(pool, champion.tenant_id, champion.domain, action, version, after, reason, {k: vars(v) for k, v in counts.items()}, now)
    await standing.forget(pool, version, "live", "shadow")
    await registry.complete_version(pool, *version, status=tier, awaits=None)
    return [f"{champion.student} v{champion.version}: {action} to {tier}, {reason}"]


async def _wait(pool: Pool, champion: Champion, verdict: Verdict, counts: Mapping[str, Tally], now: Pointer) -> list[str]:
    """What it showed is enough, but a person must say so: it stays what it is until then."""
    version, evidence = (champion.student, champion.version), {k: vars(v) for k, v in counts.items()}
    await _decide(pool, champion.tenant_id, champion.domain, "wait", version, now, verdict.reason, evidence, now)
    await registry.complete_version(pool, *version, awaits=verdict.awaits)
    return [f"{champion.student} v{champion.version}: waits for approval as {verdict.awaits}, {verdict.reason}"]


async def _decide(
    pool: Pool, tenant_id: str, domain: str, action: Action, version: Version, champion: Pointer, reason: str, evidence: dict[str, Any],
    now: Pointer,
) -> None:  # fmt: skip
    decision = Decision(tenant_id, domain, action, *version, champion, reason, evidence)
    await registry.decide(pool, decision, expected=now.sequence)


async def _facts(pool: Pool, version: Version) -> dict[str, Any]:
    """Digest, the gate's evidence of a version, and the tier it waits for."""
    for row in await registry.list_versions(pool):
        if (row["student"], row["version"]) == version:
            return {"digest": row["digest"] or "", "evidence": row["evidence"] or {}, "awaits": row["awaits"]}
    raise LookupError(f"no version {version[1]} of {version[0]}")


async def serve(_: Home, config_dir: Path, database_url: str, every: float | None) -> None:
    """Look until cancelled, or once."""
    pool, taught = await open_pool(database_url, size=1), Taught()

    async def once() -> None:
        for line in await look(pool, Rules.read(config_dir), taught):
            tell("watch", line)

    try:
        await looking(once, every=every)
    finally:
        await pool.close()


if __name__ == "__main__":
    sys.exit(command("watch", "Watch over what serves.", serve, every=EVERY_SECONDS))
