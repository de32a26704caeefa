"""The reviewer's desk: MLflow shows what the promotion ledger says, and what a reviewer does there becomes a line of that ledger.

    python -m flows.review [--every SECONDS] [--once] [--config DIR]

On a model version: tag `review` = `approve` or `veto` (before it `review.by` and `review.reason`, who and why); or the aliases `champion`,
`challenger`, `student`, `ta`, `teacher` moved by hand. What became of it is said in the tag `review.result`. A process of its own, since
MLflow takes six CPU seconds to import and 150 MB: the watch must never wait for it. Rules are `tutelage.evolution.review`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.beside import command, looking
from flows.desk import WORD, Desk
from flows.packing import pack
from flows.workshop import Cycle, StageFailed, load_adapter, tell
from tutelage.errors import AdapterRejected, BackendFailed, PromotionConflict
from tutelage.evolution.review import NAMES, TIERS, UNKNOWN, Mark, Order, moved, orders
from tutelage.fleet.tiers import Wanted
from tutelage.settings import Home
from tutelage.stores import evidence as standing
from tutelage.stores import registry, reviews
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.evidence import Rollout, Version
from tutelage.stores.registry import Action, Decision, Pointer
from tutelage.stores.reviews import Slot

EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class Office:
    """What an order needs to take effect."""

    pool: Pool
    home: Home
    config_dir: Path


async def look(office: Office, desk: Desk) -> list[str]:
    """One look at what reviewers did and at what the ledger did; what was decided, a line each."""
    told: list[str] = []
    async with reviews.alone(office.pool) as free:
        if not free:
            return told
        names, marks = desk.names(), desk.marks()
        done: set[str] = set()
        for slot in await reviews.slots(office.pool):
            if slot.student not in names:
                continue
            try:
                told += await _obey(office, desk, slot, names[slot.student], marks.get(slot.student, {}))
                done.add(slot.student)
            except (PromotionConflict, BackendFailed) as later:  # the names stay as they were moved, for the next look to obey
                told.append(later.message)
        for slot in await reviews.slots(office.pool):
            if slot.student in done:
                await _project(office.pool, desk, slot, names[slot.student])
    return told


async def pack_those_moved_up(office: Office, tried: set[Version]) -> None:
    """A Bento for everybody who answers as more than a student, or may soon, and has none. One that cannot be made is told once and noted
    in `tried`: the next process tries again."""
    for slot in await reviews.slots(office.pool):
        for version in slot.unpacked():
            path, digest = slot.files[version]
            if (slot.student, version) in tried:
                continue
            tried.add((slot.student, version))
            cycle = Cycle("review", slot.tenant_id, "", office.home.root, office.config_dir, "")  # for where state lies; nothing runs
            try:
                await pack(cycle, office.pool, student=slot.student, version=version, folder=Path(path), digest=digest)
            except StageFailed as failed:
                tell("review", f"v{version} serves without a Bento: {failed.message}", student=slot.student)


async def _obey(office: Office, desk: Desk, slot: Slot, names: Mapping[str, str], written: Mapping[str, Mark]) -> list[str]:
    """Every order of a reviewer, by what they wrote and by what they moved."""
    seen = {alias: slot.published.get(number, UNKNOWN) for alias, number in names.items()}
    elsewhere = {} if slot.shown is None else moved(slot.shown, slot.meant, seen, slot.standing)
    marks = {slot.published[number]: mark for number, mark in written.items() if number in slot.published}
    told = []
    signed: dict[int, Mark] = {UNKNOWN: Mark(""), **marks}
    for order in orders(slot.standing, elsewhere, marks):
        if order.version not in signed:
            signed[order.version] = desk.who(slot.student, slot.number(order.version))
        result = await _carry_out(office, slot, order, signed[order.version])
        if order.version != UNKNOWN:
            desk.answer(slot.student, slot.number(order.version), result, done=signed[order.version].word != "veto")
        told.append(f"{slot.student} v{order.version}: {result}")
    return told


async def _carry_out(office: Office, slot: Slot, order: Order, signed: Mark) -> str:
    """Let an order take effect; what became of it."""
    if order.action == "nothing":
        return f"nothing was done: {order.reason}"
    actor = f"mlflow:{signed.by}" if signed.by else "mlflow:a reviewer"
    reason = f"{order.reason} by {signed.by or 'a reviewer'} in MLflow" + (f": {signed.why}" if signed.why else "")
    try:
        if order.action in ("serve", "challenge", "approve"):
            path, digest = slot.files[order.version]
            wanted = Wanted(registry.adapter_name(slot.student, order.version), str(Path(path) / "adapter"), digest)
            load_adapter(office.home, office.config_dir, wanted)
    except AdapterRejected as refused:
        return f"nothing was done: {refused.message}"
    await EFFECTS[order.action](office.pool, slot, order, actor, reason)
    return reason


async def _serve(pool: Pool, slot: Slot, order: Order, actor: str, reason: str) -> None:
    """The version is the champion, whatever was said of it before; what it shows from now on is counted anew."""
    version, now = (slot.student, order.version), await registry.pointer(pool, slot.tenant_id, slot.domain)
    champion = Pointer(now.sequence + 1, *version, order.tier)
    if (now.student, now.version) != version:
        await standing.renew(pool, version)  # first: an old alarm would have the watch roll it back at once
    await _decide(pool, slot, order, _called(champion, now), champion, actor, reason)
    await standing.forget(pool, version, "live", "shadow")
    await registry.complete_version(pool, slot.student, order.version, status=order.tier, awaits=None)
    if order.version == slot.standing.challenger:
        await standing.move_rollout(pool, _rollout(slot, order), percent=100)


def _called(after: Pointer, before: Pointer) -> Action:
    """What the ledger calls it when a version is put in the place of another one, or of itself in another tier."""
    if before.student != after.student or before.version is None or after.version is None:
        return "promote"
    if before.version != after.version:
        return "rollback" if after.version < before.version else "promote"
    lower = before.tier is not None and after.tier is not None and TIERS.index(after.tier) < TIERS.index(before.tier)
    return "demote" if lower else "promote"


async def _withdraw(pool: Pool, slot: Slot, order: Order, actor: str, reason: str) -> None:
    now = await registry.pointer(pool, slot.tenant_id, slot.domain)
    await _decide(pool, slot, order, "rollback", Pointer(now.sequence), actor, f"{reason}; the teachers answer")


async def _veto(pool: Pool, slot: Slot, order: Order, actor: str, reason: str) -> None:
    """It answers nothing any more, and no rollback comes back to it."""
    now = await registry.pointer(pool, slot.tenant_id, slot.domain)
    if order.version == slot.standing.challenger:
        await _decide(pool, slot, order, "stop", now, actor, reason)
        await standing.move_rollout(pool, _rollout(slot, order), percent=0)
    elif (now.student, now.version) == (slot.student, order.version):
        former = await registry.before(pool, slot.tenant_id, slot.domain, student=slot.student, version=order.version)
        instead = f"v{former.version} answers" if former.student else "the teachers answer"
        await _decide(pool, slot, order, "rollback", former, actor, f"{reason}; {instead}")
    else:
        await _decide(pool, slot, order, "refuse", now, actor, reason)
    await registry.complete_version(pool, slot.student, order.version, status="refused", awaits=None)


async def _approve(pool: Pool, slot: Slot, order: Order, actor: str, reason: str) -> None:
    """What the engine had decided takes effect."""
    if order.version == slot.standing.champion:
        await _serve(pool, slot, order, actor, reason)
    elif order.version == slot.standing.challenger:
        now = await registry.pointer(pool, slot.tenant_id, slot.domain)
        await _decide(pool, slot, order, "challenge", now, actor, f"{reason}, when it takes over")
        await pool.execute("update rollouts set tier = $3 where student = $1 and version = $2", slot.student, order.version, order.tier)
        await registry.complete_version(pool, slot.student, order.version, awaits=None)
    elif slot.standing.champion is not None:
        await _challenge(pool, slot, order, actor, reason)
    else:
        await _serve(pool, slot, order, actor, reason)


async def _challenge(pool: Pool, slot: Slot, order: Order, actor: str, reason: str) -> None:
    now = await registry.pointer(pool, slot.tenant_id, slot.domain)
    await _decide(pool, slot, order, "challenge", now, actor, reason)
    await registry.complete_version(pool, slot.student, order.version, status="challenger", awaits=None)
    await standing.begin_rollout(pool, _rollout(slot, order))


EFFECTS = {"serve": _serve, "withdraw": _withdraw, "veto": _veto, "stop": _veto, "approve": _approve, "challenge": _challenge}


def _rollout(slot: Slot, order: Order) -> Rollout:
    return Rollout(slot.tenant_id, slot.domain, slot.student, order.version, slot.percent, order.tier or "student")


async def _decide(pool: Pool, slot: Slot, order: Order, action: Action, champion: Pointer, actor: str, reason: str) -> None:
    """Raises PromotionConflict where the ledger has moved since the order was read: it may mean something else now."""
    decision = Decision(slot.tenant_id, slot.domain, action, slot.student, order.version, champion, reason, {}, actor)
    await registry.decide(pool, decision, expected=slot.sequence)


async def _project(pool: Pool, desk: Desk, slot: Slot, names: Mapping[str, str]) -> None:
    """Have MLflow's names and words say what the ledger says."""
    wanted = slot.standing.names()
    numbers = {alias: slot.number(version) for alias, version in wanted.items()}
    stands = {alias: number for alias, number in names.items() if alias in NAMES} == numbers
    if stands and slot.shown == wanted and slot.told == slot.sequence:
        return
    await reviews.mean(pool, slot.student, wanted)
    if not desk.put(slot.student, numbers, seen=names):
        return  # somebody moved one just now: the next look asks why
    lines = await reviews.lines(pool, slot)
    new = {line["version"] for line in lines if line["sequence"] > slot.told and line["student"] == slot.student}
    for version in sorted({*new, *wanted.values(), *(slot.shown or {}).values()} & set(slot.status)):
        counts = await standing.read(pool, (slot.student, version))
        mine = [line for line in lines if (line["student"], line["version"]) == (slot.student, version)]
        desk.describe(slot.student, slot.number(version), _tags(slot, version), _since(slot, version, counts, mine))
    await reviews.shown(pool, slot.student, wanted, told=slot.sequence)


def _tags(slot: Slot, version: int) -> dict[str, str]:
    held = slot.standing
    if version == held.champion:
        return {"tier": held.tier or "none", "standing": "champion", "awaits": held.waiting.get(version, "nobody")}
    place = f"challenger, {slot.percent} % of the requests" if version == held.challenger else slot.status[version]
    return {"tier": "none", "standing": place, "awaits": held.waiting.get(version, "nobody")}


def _since(slot: Slot, version: int, counts: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """The evidence up to now and every decision, in Markdown; first what a reviewer is asked for, if anything."""
    awaits = slot.standing.waiting.get(version)
    asked = f"**Waits for a person as {awaits}**: set the tag `{WORD}` to `approve` or `veto`.\n\n" if awaits else ""
    table = ["| evidence | won | even | lost | win rate |", "|---|---:|---:|---:|---:|"]
    table += [f"| {source} | {t.wins} | {t.ties} | {t.losses} | {t.rate:.3f} |" for source, t in sorted(counts.items())]
    history = ["| when | decided | by | why |", "|---|---|---|---|"]
    for line in lines:
        why = line["reason"].replace("|", "/").replace("\n", " ")
        history.append(f"| {line['created_at']:%Y-%m-%d %H:%M:%S} UTC | {line['action']} | {line['actor']} | {why} |")
    return asked + "\n".join([*table, "", *history])


async def serve(home: Home, config_dir: Path, database_url: str, every: float | None) -> None:
    """Look until cancelled, or once; MLflow is imported when there is anything to review."""
    pool = await open_pool(database_url, size=2)
    office, desk = Office(pool, home, config_dir), None
    tried: set[Version] = set()

    async def once() -> None:
        nonlocal desk
        if desk is None and await reviews.slots(pool):
            desk = Desk(home.environment()["MLFLOW_TRACKING_URI"])
        for line in await look(office, desk) if desk is not None else ():
            tell("review", line)
        await pack_those_moved_up(office, tried)

    try:
        await looking(once, every=every)
    finally:
        await pool.close()


if __name__ == "__main__":
    sys.exit(command("review", "Show the ledger in MLflow and obey reviewers there.", serve, every=EVERY_SECONDS))
