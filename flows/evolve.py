"""The loop on one page: gaps → students → distillation → gate → registry → Bento → rollout.

    python -m flows.evolve [--tenant NAME] [--config DIR] [--spawn DOMAIN]

One process at a time runs a cycle of a tenant; the next one gives up what a killed one left half done, and begins anew. It refuses to
hold a rule or a computation: rules are in `tutelage`, computations in `training`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import flow

from flows.gate import Judged, gate, package, register, roll_out, show
from flows.story import tell_story
from flows.students import curate, distill, evaluate, finetune, spawn
from flows.traffic import detect_gaps, find_domains, learn_estimates, tune
from flows.workshop import Cycle, connected, end_stage, tell
from tutelage.errors import CycleRunning, PlanLimitReached, TutelageError
from tutelage.fleet import processes
from tutelage.settings import Home
from tutelage.stores import cycles, registry, tenants
from tutelage.stores.database import Pool


@flow(name="evolve", flow_run_name="evolve-{cycle.tenant_name}-{cycle.id}", validate_parameters=False)
async def evolve(cycle: Cycle) -> dict[str, Any]:
    """One cycle for one tenant; what became of every gap."""
    if not await find_domains(cycle):
        return {"students": {}, "note": "no traffic yet"}
    await learn_estimates(cycle)
    await tune(cycle)
    gaps = await detect_gaps(cycle)
    judged: list[Judged] = []
    for gap in gaps:
        if gap.decision == "train":
            try:
                student = await spawn(cycle, gap)
            except PlanLimitReached as full:  # the students it has may still get better ones in their place
                tell("spawn", full.message, student=gap.domain)
                continue
            await curate(cycle, student)
            await distill(cycle, student)
            await finetune(cycle, student)
            await evaluate(cycle, student)
            judged.append(await gate(cycle, student))
    if judged:
        await register(cycle, judged)
    for entry in judged:
        if entry.verdict.action in ("promote", "challenge", "wait"):  # whoever promotes it later, watch or reviewer, finds its Bento
            await package(cycle, entry)
        await roll_out(cycle, entry)
    if judged:
        await show(cycle)
    await tell_story(cycle, gaps, judged)
    return {"students": {e.student.name: {"action": e.verdict.action, "reason": e.verdict.reason} for e in judged}}


async def run(home: Home, *, config_dir: Path, database_url: str, tenant: str | None, asked: Sequence[str] = ()) -> None:
    """A cycle for the tenant, or for each tenant in turn. Raises CycleRunning when the tenant's is running already."""
    start = Cycle("", "", "", home.root, config_dir, database_url, tuple(asked))
    async with connected(start) as pool:
        chosen = [await tenants.find_tenant(pool, tenant)] if tenant else await tenants.list_tenants(pool)
        for one in chosen:
            if one.training == "off":
                tell("evolve", f"{one.name} wants nothing learned from its traffic: `tutelage tenants change {one.name} --training on`")
                continue
            try:
                async with cycles.alone(pool, one.id) as cut_off:
                    for cycle_id in cut_off:
                        tell("evolve", f"cycle {cycle_id} of {one.name} was cut off; it begins anew")
                        await asyncio.to_thread(end_stage, home, cycle_id)
                    await _one(pool, replace(start, id=uuid.uuid4().hex[:12], tenant_id=one.id, tenant_name=one.name))
            except CycleRunning as running:
                if tenant:
                    raise
                tell("evolve", running.message)


async def _one(pool: Pool, cycle: Cycle) -> None:
    """One cycle between its two rows; whatever ends it, no version stays half done."""
    await registry.open_cycle(pool, cycle.id, cycle.tenant_id)
    summary: dict[str, Any] = {"students": {}}
    status = "failed"
    try:
        summary = await evolve(cycle)
        status = "finished"
    finally:
        await registry.close_cycle(pool, cycle.id, status=status, summary=summary)
        await cycles.clear_halves(pool, cycle.tenant_id)
    tell("evolve", f"cycle {cycle.id} of {cycle.tenant_name}: {len(summary['students'])} students examined")


def main() -> int:
    from tutelage.operations import database

    parser = argparse.ArgumentParser(description="Run an evolution cycle now.")
    parser.add_argument("--tenant", metavar="NAME")
    parser.add_argument("--config", metavar="DIR")
    parser.add_argument("--spawn", nargs="+", default=[], metavar="DOMAIN", help="students for these gaps and no others")
    arguments = parser.parse_args()
    home = Home.from_environment()
    processes.on_terminate_raise()
    try:
        with database(home) as url:
            config = home.config_dir(arguments.config)
            asyncio.run(run(home, config_dir=config, database_url=url, tenant=arguments.tenant, asked=arguments.spawn))
    except TutelageError as error:
        print(f"evolve: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
