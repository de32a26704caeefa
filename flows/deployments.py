"""Cycles as deployments of this home's Prefect server: by event, on schedule and by hand, one at a time, in a work pool of its own.

    python -m flows.deployments [--config DIR]        registers everything again, then works as the pool's worker (`tutelage ui` starts it)

The timer beside the gateway tells when a cycle is due (event `tutelage.cycle.due`); an automation of the `due` deployment runs it for that
tenant. A flow run whose process was killed is shown as crashed. It refuses to know what a cycle does (`evolve.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import flow

from flows.evolve import run
from flows.timer import EVENT
from tutelage.evolution.gaps import EvolveSettings
from tutelage.settings import CHECKOUT, Home, load

POOL = "tutelage"
ENTRYPOINT = "flows/deployments.py:cycles"
SILENT = "Cycles whose process was killed"
SILENT_SECONDS = 90


@flow(name="cycles", flow_run_name="cycles-of-{tenant}")
def cycles(tenant: str | None = None, asked: list[str] | None = None) -> None:
    """A cycle of the tenant (its name or id), or of every tenant in turn; `asked`: students for these gaps and no others."""
    from tutelage.operations import database

    home = Home.from_environment()
    with database(home) as url:
        asyncio.run(run(home, config_dir=home.config_dir(), database_url=url, tenant=tenant, asked=asked or ()))


async def register(settings: EvolveSettings) -> list[str]:
    """Bring the server's work pool, deployments and automations to what the code and evolve.yaml say; the deployments' names."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.events import DeploymentEventTrigger
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.schedules import Interval

    async with get_client() as client:
        try:
            await client.create_work_pool(WorkPoolCreate(name=POOL, type="process", concurrency_limit=1))
        except ObjectAlreadyExists:
            await client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=1))
    due = DeploymentEventTrigger(
        name="A cycle is due",
        expect={EVENT},
        match={"prefect.resource.id": "tutelage.tenant.*"},
        parameters={"tenant": "{{ event.payload.tenant }}"},
    )
    hours = settings.schedule_hours
    planned: dict[str, dict[str, Any]] = {
        "due": {"triggers": [due], "description": "When the timer says so, and by hand: a tenant, or all of them"},
        "on-schedule": {
            "schedules": [Interval(timedelta(hours=hours), slug="evolve")] if hours else [],
            "description": f"All tenants every {hours:g} hours" if hours else "No schedule: evolve.yaml, schedule_hours",
        },
    }
    source: Any = await cycles.afrom_source(str(CHECKOUT), ENTRYPOINT)
    one = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
    for name, more in planned.items():
        await source.adeploy(name, work_pool_name=POOL, concurrency_limit=one, build=False, print_next_steps=False, **more)
    await _show_killed_runs_as_crashed()
    return [f"cycles/{name}" for name in planned]


async def _show_killed_runs_as_crashed() -> None:
    """The automation of Prefect's own guide: a run that stops sending its heartbeat has crashed."""
    from prefect.automations import Automation
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    async with get_client() as client:
        if await client.read_automations_by_name(SILENT):
            return
    ended = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    trigger = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *ended},
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=SILENT_SECONDS),
    )
    told = "Its process was killed; the next cycle of the tenant takes over."
    crashed = ChangeFlowRunState(name=None, force=False, state=StateType.CRASHED, message=told)
    await Automation(name=SILENT, trigger=trigger, actions=[crashed]).acreate()


async def work(config_dir: Path) -> None:
    """Register, then run what the pool is given until cancelled."""
    from prefect.workers.process import ProcessWorker

    for name in await register(load(EvolveSettings, config_dir)):
        print(f"deployments: {name} in work pool {POOL}", flush=True)
    await ProcessWorker(POOL, limit=1).start()


def main() -> int:
    from tutelage.fleet import processes

    parser = argparse.ArgumentParser(prog="python -m flows.deployments", description="Register the deployments and work for them.")
    parser.add_argument("--config", metavar="DIR")
    arguments = parser.parse_args()
    processes.on_terminate_raise()
    try:
        asyncio.run(work(Home.from_environment().config_dir(arguments.config)))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
