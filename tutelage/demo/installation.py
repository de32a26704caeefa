"""What a demo runs on: its configuration, a tenant of its own, evolution cycles as `tutelage evolve` runs them, free ports.

It refuses to know what is sent and what the report says.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tutelage.demo.console import Progress
from tutelage.errors import EngineFailed
from tutelage.fleet import engines, processes
from tutelage.fleet.local import Local
from tutelage.operations import add_tenant
from tutelage.settings import CHECKOUT, Home, Price, TierSettings, load
from tutelage.stores import tenants
from tutelage.stores.database import Pool, open_pool

TEACHER = "recorded-teacher"
PRICE = Price(input_per_mtok=2.50, output_per_mtok=10.00)  # gpt-4o list price
KNOWN_SECONDS = 30.0  # until which a gateway must have read a new key

# Evaluation's costliest baseline, the base shown its nearest examples, stands in no demo's report: not measuring it saves a third of
# evaluation's time.
CHANGES: dict[str, dict[str, Any]] = {"evaluate": {"in_context_items": 0}}


@dataclass(frozen=True)
class Customer:
    """A tenant of the demo and its key."""

    key: str
    tenant_id: str
    name: str


@dataclass(frozen=True)
class Cycled:
    """How long an evolution cycle took, all of it and by stage (seconds of wall time)."""

    seconds: float
    stages: dict[str, float] = field(default_factory=dict)


def configure(home: Home, recording: Path, *, source: Path | None = None, delay_seconds: float = 0.0, **changes: dict[str, Any]) -> Path:
    """The configuration of `source` (default: the checkout's) with the recording as the only teacher; the home keeps it, so that a later
    `tutelage serve` finds it. `changes` are values by file."""
    target = home.folder("config")
    for file in (source or CHECKOUT / "configs").glob("*.yaml"):
        shutil.copyfile(file, target / file.name)
    teacher = {"name": TEACHER, "tier": "teacher", "kind": "recorded", "path": str(recording), "price": PRICE.model_dump()}
    _write(target / "models.yaml", {"models": [teacher | ({"delay_seconds": delay_seconds} if delay_seconds else {})]})
    tier = load(TierSettings, target)
    _write(target / "tier.yaml", tier.model_dump() | {"port": free_port(tier.port)})
    for name, values in (CHANGES | changes).items():
        file = target / f"{name}.yaml"
        _write(file, (yaml.safe_load(file.read_text()) if file.exists() else {}) | values)
    return target


def customers(home: Home, local: Local, *names: str) -> list[Customer]:
    """A new tenant for each name, or one called like it where that is taken: a second demo in the same home starts from nothing again."""

    async def make() -> list[Customer]:
        pool = await open_pool(local.engines.database_url, size=1)
        try:
            return [await _customer(pool, home.secret("pepper"), name) for name in names]
        finally:
            await pool.close()

    made = asyncio.run(make())
    for one in made:
        _admitted(local.url, one.key)
    return made


def _admitted(url: str, key: str) -> None:
    """Wait until the gateway knows a key: it reads new ones every half second, and refuses until then. Raises EngineFailed."""
    import httpx

    deadline = time.monotonic() + KNOWN_SECONDS
    while httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=KNOWN_SECONDS).status_code != 200:
        if time.monotonic() > deadline:
            raise EngineFailed(f"the gateway at {url} does not know a key that was made {KNOWN_SECONDS:.0f} s ago; read its log")
        time.sleep(0.05)


async def _customer(pool: Pool, pepper: str, name: str) -> Customer:
    taken = {tenant.name for tenant in await tenants.list_tenants(pool)}
    free = next(free for free in (name, *(f"{name}-{n}" for n in range(2, 10_000))) if free not in taken)
    made = await add_tenant(pool, pepper, name=free, tier="enterprise")
    return Customer(made["key"], made["tenant_id"], free)


def evolve(local: Local, tenant: str, progress: Progress, *, title: str = "evolution cycle") -> Cycled:
    """One cycle as `tutelage evolve` runs it, its progress shown; the tier has what it decided. Raises EngineFailed when it fails."""
    home, started = local.home, time.monotonic()
    file = home.run / "progress.jsonl"
    file.write_text("")
    command = processes.python("-m", "flows.evolve", "--tenant", tenant, "--config", str(local.config_dir))
    stages: dict[str, float] = {}
    noted = started
    with (
        progress.stage(title, total=None) as stage,
        processes.run(home, "evolve", command, environment={"TUTELAGE_PROGRESS": str(file)}) as process,
        file.open() as lines,
    ):
        while True:
            ended = process.poll() is not None
            for line in lines:
                fact, now = json.loads(line), time.monotonic()
                # a stage tells when it has got somewhere: what passed since the note before is its own
                stages[fact["stage"]] = stages.get(fact["stage"], 0.0) + now - noted
                noted = now
                stage.note(fact["stage"], fact["text"], student=fact["student"], done=fact["done"], total=fact["total"])
            if ended:
                break
            time.sleep(0.3)
    if process.returncode:
        raise EngineFailed(f"the evolution cycle failed; read {home.logs / 'evolve.log'}")
    local.reconcile()
    return Cycled(time.monotonic() - started, stages)


def free_port(usual: int) -> int:
    """The usual port, or a free one when something else has it."""
    for port in (usual, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise EngineFailed("no free port on 127.0.0.1")


def postmaster(home: Home) -> list[int]:
    pid = engines.postmaster(home)
    return [pid] if pid else []


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text("# written by `tutelage demo`\n" + yaml.safe_dump(values, sort_keys=False))
