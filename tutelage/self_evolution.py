"""SelfEvolutionEngine: evolution cycles from inside a program. A thin facade over what `tutelage evolve` runs, in a process of its own, so
nothing heavy is imported here. It refuses to hold any rule.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from tutelage import errors, operations
from tutelage.api import DistributedOrchestrator
from tutelage.evolution.gaps import EvolveSettings
from tutelage.evolution.timing import Due, due
from tutelage.fleet import consoles, processes
from tutelage.settings import CHECKOUT, load
from tutelage.stores import cycles, tenants
from tutelage.stores.database import Pool, open_pool

Result = TypeVar("Result")
LAST_LINES = 12


@dataclass(frozen=True)
class ExaminedStudent:
    """One student of a cycle: what the gate decided (promote, keep, challenge or refuse) and why."""

    name: str
    action: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class EvolutionCycle:
    """One tenant's cycle. `status`: finished or failed; `gaps`: what it found, in the order of what training is expected to save."""

    cycle_id: str
    tenant_id: str
    status: str
    students: tuple[ExaminedStudent, ...]
    gaps: tuple[dict[str, Any], ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SelfEvolutionEngine:
    """Evolution cycles of an installation, as `tutelage evolve` runs them, under settings of one's own.

    `evolution_interval`: interactions of a tenant after which its next cycle is due; `auto_spawn_students` false: gaps are proposed, and
    `spawn` makes students of them; `max_models_per_domain`: versions that a domain keeps to answer. `preset` (aggressive, stable) gives
    what is not given here. All else is as evolve.yaml says; a `tutelage serve` of this home goes by that file alone.
    """

    def __init__(
        self,
        orchestrator: DistributedOrchestrator,
        evolution_interval: int | None = None,
        auto_spawn_students: bool | None = None,
        max_models_per_domain: int | None = None,
        *,
        preset: Literal["aggressive", "stable"] | None = None,
    ) -> None:
        """Raises ConfigInvalid for a value that is not allowed."""
        self.orchestrator = orchestrator
        given = {
            "preset": preset, "evolution_interval": evolution_interval, "auto_spawn_students": auto_spawn_students,
            "max_models_per_domain": max_models_per_domain,
        }  # fmt: skip
        self._folder = tempfile.TemporaryDirectory(prefix="engine-", dir=orchestrator.home.run)
        self._config = self._written({name: value for name, value in given.items() if value is not None})
        self.settings = load(EvolveSettings, self._config)

    def trigger_evolution_cycle(self, tenant_id: str | None = None) -> list[EvolutionCycle]:
        """Run a cycle of the tenant (its id or name) now, or of every tenant in turn, to its end; what became of each.

        Raises:
            NotFound: no such tenant. CycleRunning: another process runs one. CycleFailed: it ended with an error; the message says where.
        """
        return self._cycle(tenant_id, ())

    def spawn(self, tenant_id: str, *domains: str) -> list[EvolutionCycle]:
        """Train students for these gaps now and for no others. Raises as `trigger_evolution_cycle`, and InvalidRequest where a gap is
        unknown or not worth a student."""
        asked = Namespace(tenant=tenant_id, domain=list(domains), config=str(self._config))
        self._ask(lambda pool: operations.check_proposed(pool, self.orchestrator.home, asked))
        return self._cycle(tenant_id, domains)

    def gaps(self) -> list[dict[str, Any]]:
        """Where the teacher is needed often and dearly, as of now, all tenants; what a cycle would decide on each, and why."""
        return self._ask(lambda pool: operations.list_gaps(pool, self.orchestrator.home, Namespace(config=str(self._config))))

    def due(self) -> dict[str, Due]:
        """By tenant id, whether its next cycle is due, and why or why not."""
        found = self._ask(lambda pool: cycles.seen(pool, interval=self.settings.evolution_interval))
        return {tenant_id: due(seen, self.settings, now=datetime.now(UTC)) for tenant_id, _, seen in found}

    def _cycle(self, tenant: str | None, domains: Sequence[str]) -> list[EvolutionCycle]:
        if tenant is not None:
            self._ask(partial(tenants.find_tenant, name_or_id=tenant))
        before = self._ask(cycles.last)
        home, running = self.orchestrator.home, self.orchestrator.engines
        command = processes.python("-m", "flows.evolve", "--config", str(self._config))
        command += (["--tenant", tenant] if tenant else []) + (["--spawn", *domains] if domains else [])
        environment = {**os.environ, **home.environment(), "TUTELAGE_DATABASE_URL": running.database_url, "PYTHONPATH": str(CHECKOUT)}
        prefect = consoles.running(home, "prefect")
        done = subprocess.run(
            command, cwd=CHECKOUT, env={**environment, **({"PREFECT_API_URL": f"{prefect}/api"} if prefect else {})},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            told = (done.stdout + done.stderr).strip().splitlines()[-LAST_LINES:]
            kind = errors.CycleRunning if any("is running; wait" in line for line in told) else errors.CycleFailed
            raise kind(f"the cycle ended with status {done.returncode}: " + " | ".join(told)[-1500:])
        return [_told(row) for row in self._ask(partial(cycles.since, moment=before))]

    def _ask(self, work: Callable[[Pool], Coroutine[Any, Any, Result]]) -> Result:
        url = self.orchestrator.engines.database_url

        async def connected() -> Result:
            pool = await open_pool(url, size=1)
            try:
                return await work(pool)
            finally:
                await pool.close()

        return self.orchestrator.run(connected())

    def _written(self, given: Mapping[str, Any]) -> Path:
        """The installation's configuration with these values in evolve.yaml, in a folder of this engine's own."""
        folder = Path(self._folder.name)
        shutil.copytree(self.orchestrator.config_dir, folder, dirs_exist_ok=True)
        file = folder / "evolve.yaml"
        shipped = yaml.safe_load(file.read_text()) if file.exists() else {}
        file.write_text(yaml.safe_dump({**(shipped or {}), **given}, sort_keys=False))
        return folder


def _told(row: Mapping[str, Any]) -> EvolutionCycle:
    students = [ExaminedStudent(name, told["action"], told["reason"]) for name, told in (row["summary"] or {}).get("students", {}).items()]
    seconds = (row["finished_at"] - row["started_at"]).total_seconds()
    return EvolutionCycle(row["id"], row["tenant_id"], row["status"], tuple(students), tuple(row["gaps"]), seconds)
