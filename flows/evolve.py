"""The loop on one page: gaps → students → distillation → gate → registry → Bento → rollout.

    python -m flows.evolve [--tenant NAME] [--config DIR] [--take-over]

It refuses to hold a rule or a computation: rules are in `tutelage`, computations in `training`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from pathlib import Path
from typing import Any

from prefect import flow

from flows.gate import Judged, gate, package, register, roll_out
from flows.students import curate, distill, evaluate, finetune, spawn
from flows.traffic import detect_gaps, find_domains, learn_estimates, tune
from flows.workshop import Cycle, connected, tell
from tutelage.errors import PlanLimitReached, TutelageError
from tutelage.settings import Home
from tutelage.stores import registry, tenants


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
        if entry.verdict.action == "promote":
            await package(cycle, entry)
        await roll_out(cycle, entry)
    return {"students": {e.student.name: {"action": e.verdict.action, "reason": e.verdict.reason} for e in judged}}


async def run(home: Home, *, config_dir: Path, database_url: str, tenant: str | None, take_over: bool) -> None:
    """A cycle for the tenant, or for each tenant in turn. Raises InvalidRequest when one is running already."""
    start = Cycle("", "", "", home.root, config_dir, database_url)
    async with connected(start) as pool:
        chosen = [await tenants.find_tenant(pool, tenant)] if tenant else await tenants.list_tenants(pool)
        for one in chosen:
            if one.training == "off":
                tell("evolve", f"{one.name} wants nothing learned from its traffic: `tutelage tenants change {one.name} --training on`")
                continue
            if take_over:
                await registry.abandon_cycles(pool, one.id)
            cycle = Cycle(uuid.uuid4().hex[:12], one.id, one.name, home.root, config_dir, database_url)
            await registry.open_cycle(pool, cycle.id, one.id)
            summary: dict[str, Any] = {"students": {}}
            status = "failed"
            try:
                summary = await evolve(cycle)
                status = "finished"
            finally:
                await registry.close_cycle(pool, cycle.id, status=status, summary=summary)
            tell("evolve", f"cycle {cycle.id} of {one.name}: {len(summary['students'])} students examined")


def main() -> int:
    from tutelage.fleet import processes
    from tutelage.operations import database

    parser = argparse.ArgumentParser(description="Run an evolution cycle now.")
    parser.add_argument("--tenant", metavar="NAME")
    parser.add_argument("--config", metavar="DIR")
    parser.add_argument("--take-over", action="store_true")
    arguments = parser.parse_args()
    home = Home.from_environment()
    processes.on_terminate_raise()
    try:
        with database(home) as url:
            config = home.config_dir(arguments.config)
            asyncio.run(run(home, config_dir=config, database_url=url, tenant=arguments.tenant, take_over=arguments.take_over))
    except TutelageError as error:
        print(f"evolve: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
