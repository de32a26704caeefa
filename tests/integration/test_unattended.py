"""Cycles that begin by themselves and survive being killed: the timer, the flow, its stages and Prefect's worker as real processes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from fakes import build_tiny_base

from tutelage.fleet import consoles, processes
from tutelage.records import Interaction, Tenant
from tutelage.settings import CHECKOUT, Home
from tutelage.stores import interactions, tenants
from tutelage.stores.database import open_pool

pytestmark = pytest.mark.slow
TENANT = Tenant("ten_a", "acme", "pro")
SIGNALS = {"red": "stop", "green": "go", "amber": "wait"}
PLACES = ["harbour", "station", "bridge", "market", "school", "museum", "garden", "tower", "castle", "square", "river", "church"]
DEADLINE_SECONDS = 300.0


@dataclass(frozen=True)
class Installation:
    """A home with a database of its own, a tiny base and short trainings."""

    home: Home
    config: Path
    environment: dict[str, str]
    database_url: str

    def start(self, name: str, *arguments: str) -> psutil.Popen:
        return processes.start(self.home, name, [sys.executable, "-u", *arguments], environment=self.environment)

    def configure(self, module: str, **values: Any) -> None:
        (self.config / f"{module}.yaml").write_text(yaml.safe_dump(values))

    def query(self, sql: str) -> list[dict[str, Any]]:
        async def fetch() -> list[dict[str, Any]]:
            pool = await open_pool(self.database_url, size=1)
            try:
                return [dict(row) for row in await pool.fetch(sql)]
            finally:
                await pool.close()

        return asyncio.run(fetch())

    def cycles(self) -> list[str]:
        return [row["status"] for row in self.query("select status from cycles order by started_at")]

    def record(self, count: int, *, seed: int) -> None:
        """So many answered requests of one kind, as the gateway records them."""
        rng, now = random.Random(seed), datetime.now(UTC)
        rows = []
        for number in range(count):
            colour = rng.choice(sorted(SIGNALS))
            prompt = f"The light at the {rng.choice(PLACES)} number {rng.randrange(10_000)} shows {colour}. What do you do?"
            rows.append(
                Interaction(
                    request_id=f"r{seed}-{number}", tenant_id=TENANT.id, key_id="k", created_at=now, prompt_hash=b"h",
                    messages=[{"role": "user", "content": prompt}], answer=SIGNALS[colour], model="teacher", tier="teacher",
                    route="cascade", reason="", cache="miss", domain="lights", given_domain="lights", confidence=None,
                    finish_reason="stop", prompt_tokens=20, completion_tokens=1, tokens_estimated=False, cost_microusd=60, latency_ms=9,
                )
            )  # fmt: skip

        async def write() -> None:
            pool = await open_pool(self.database_url, size=2)
            recorder = interactions.Recorder(pool, flush_seconds=0, batch_rows=100, deadline_seconds=30)
            recorder.start()
            await asyncio.gather(*(recorder.record(row) for row in rows))
            await recorder.stop()
            await pool.close()

        asyncio.run(write())

    def left_running(self) -> list[str]:
        """Command lines of processes that work for this home still; Prefect's server is another home's."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("TUTELAGE_HOME") == str(self.home.root) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
        return found


def until(true: Callable[[], Any], what: str, *, log: Path | None = None, pause: float = 0.2) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := true()):
        told = log.read_text()[-2000:] if log is not None and log.exists() else ""
        assert time.monotonic() < deadline, f"not in {DEADLINE_SECONDS:.0f} s: {what}\n{told}"
        time.sleep(pause)
    return found


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, str]]:
    """A Prefect server for the tests of this file, as `tutelage ui` starts it."""
    home = Home(tmp_path_factory.mktemp("prefect"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = processes.python("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with processes.run(home, "ui-prefect", command):
        url = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            with suppress(httpx.HTTPError):
                return httpx.get(f"{url}/api/health", timeout=2).status_code == 200
            return False

        until(ready, "Prefect's server is ready", log=home.logs / "ui-prefect.log")
        yield home, url


@pytest.fixture
def installation(home: Home, database_url: str, encoder: Path, prefect: tuple[Home, str]) -> Iterator[Installation]:
    build_tiny_base(home.models / "smollm2-135m-instruct")
    (home.models / "encoder").symlink_to(encoder)
    config = home.folder("config")
    for source in (CHECKOUT / "configs").glob("*.yaml"):
        (config / source.name).write_text(source.read_text())
    told = {
        "TUTELAGE_DATABASE_URL": database_url, "TUTELAGE_CONFIG": str(config), "PREFECT_API_URL": f"{prefect[1]}/api",
        "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    made = Installation(home, config, told, database_url)
    made.configure("tier", port=9)  # no tier listens there

    async def begin() -> None:
        pool = await open_pool(database_url, size=1)
        await tenants.create_tenant(pool, TENANT)
        await pool.close()

    asyncio.run(begin())
    yield made
    for name in processes.names(home):
        processes.stop(home, name, grace=5)


def test_enough_interactions_begin_a_cycle_by_themselves_and_a_killed_one_is_taken_over(installation: Installation) -> None:
    installation.configure("evolve", evolution_interval=40, schedule_hours=None, rest_minutes=0, min_requests=1000)
    log = installation.home.logs / "cycle.log"
    timer = installation.start("timer", "-m", "flows.timer", "--every", "0.2")
    installation.record(39, seed=1)
    time.sleep(1.5)
    assert installation.cycles() == []

    installation.record(1, seed=2)
    until(lambda: installation.cycles() == ["running"], "a cycle began", log=log, pause=0.05)
    child = processes.find(installation.home, "cycle")
    assert child is not None
    assert child.nice() >= 10
    child.kill()
    until(lambda: installation.cycles() == ["failed", "finished"], "another took over", log=log)

    installation.record(39, seed=3)
    time.sleep(1.5)
    assert installation.cycles() == ["failed", "finished"], "what a finished cycle has seen is not counted again"
    installation.record(1, seed=4)
    until(lambda: installation.cycles() == ["failed", "finished", "finished"], "the next one", log=log)

    timer.send_signal(signal.SIGTERM)
    timer.wait(30)
    assert installation.left_running() == []


def test_where_prefect_runs_an_event_has_its_worker_run_the_cycle(installation: Installation, prefect: tuple[Home, str]) -> None:
    installation.configure("evolve", evolution_interval=10, schedule_hours=6, rest_minutes=60, min_requests=1000)
    server = processes.find(prefect[0], "ui-prefect")
    assert server is not None
    processes.note(installation.home, "ui-prefect", server.pid, server.cmdline())
    try:
        os.environ |= installation.environment
        consoles.begin_worker(installation.home, prefect[1], config_dir=installation.config)
        log = installation.home.logs / f"{consoles.WORKER}.log"
        until(lambda: "deployments: cycles/on-schedule" in log.read_text(), "the deployments are registered", log=log)
        deployments = httpx.post(f"{prefect[1]}/api/deployments/filter", json={}).json()
        assert {d["name"]: [s["schedule"]["interval"] for s in d["schedules"]] for d in deployments} == {
            "due": [],
            "on-schedule": [21600.0],
        }
        assert {d["work_pool_name"] for d in deployments} == {"tutelage"}
        assert {d["concurrency_options"]["collision_strategy"] for d in deployments} == {"ENQUEUE"}
        automations = httpx.post(f"{prefect[1]}/api/automations/filter", json={}).json()
        assert len(automations) == 2, "a due cycle is run, a killed one is shown"

        installation.start("timer", "-m", "flows.timer", "--every", "0.2")
        installation.record(10, seed=1)
        until(lambda: installation.cycles() == ["finished"], "the worker ran it", log=log)
        runs = httpx.post(f"{prefect[1]}/api/flow_runs/filter", json={"flows": {"name": {"any_": ["cycles"]}}}).json()
        assert [run["parameters"]["tenant"] for run in runs if run["deployment_id"]] == [TENANT.id]
    finally:
        processes.forget(installation.home, "ui-prefect")
        for name in installation.environment:
            os.environ.pop(name, None)


TRAINING = {"budget_tokens": 60_000, "probe_tokens": 12_000, "learning_rate": 0.01, "max_epochs": 12}
BEFORE_THE_GATE = (
    "told domains", "told gaps", "told begin", "runs training.pipeline", "runs curate", "runs distill", "runs finetune", "runs evaluate",
)  # fmt: skip
FROM_THE_GATE_ON = ("told gate", "runs training.publish", "runs bentos.tier.package", "told answers")


@pytest.mark.parametrize("steps", [BEFORE_THE_GATE, FROM_THE_GATE_ON], ids=["before the gate", "from the gate on"])
def test_killed_at_every_step_a_cycle_leaves_one_champion_and_no_half_student(installation: Installation, steps: tuple[str, ...]) -> None:
    installation.configure("evolve", min_requests=80)
    shipped = yaml.safe_load((CHECKOUT / "configs/finetune.yaml").read_text())
    installation.configure("finetune", **(shipped | TRAINING))
    installation.record(260, seed=1)
    for step in steps:
        killed_at(installation, step)
        assert len(champions(installation)) <= 1
    done = installation.start("evolve", "-m", "flows.evolve", "--tenant", "acme")
    until(lambda: done.poll() is not None, "the last cycle ends", log=installation.home.logs / "evolve.log")
    assert done.returncode == 0, (installation.home.logs / "evolve.log").read_text()[-3000:]

    states = [row["status"] for row in installation.query("select status from versions order by version")]
    assert set(states) <= {"abandoned", "ta"}, states
    assert [c["status"] for c in champions(installation)] == ["ta"] == [state for state in states if state != "abandoned"]
    assert set(installation.cycles()) == {"failed", "finished"}
    assert installation.left_running() == []


def champions(installation: Installation) -> list[dict[str, Any]]:
    return installation.query(
        "select v.student, v.version, v.status from (select distinct on (tenant_id, domain) * from promotions "
        "order by tenant_id, domain, sequence desc) p join versions v on v.student = p.champion_student and v.version = p.champion_version"
    )


def killed_at(installation: Installation, step: str) -> None:
    """Begin a cycle and SIGKILL it, and nothing else, at the step: when it has told of it, or while the process of it runs."""
    how, name = step.split()
    told = installation.home.run / "progress.jsonl"
    told.write_text("")
    installation.environment["TUTELAGE_PROGRESS"] = str(told)
    cycle = installation.start("evolve", "-m", "flows.evolve", "--tenant", "acme")

    def there() -> bool:
        assert cycle.poll() is None, f"ended before {step}: {(installation.home.logs / 'evolve.log').read_text()[-3000:]}"
        if how == "told":
            lines = [json.loads(line) for line in told.read_text().splitlines()]
            return any(name == line["stage"] or (line["stage"] == "rollout" and name in line["text"]) for line in lines)
        for file in installation.home.run.glob("stage-*.json"):
            with suppress(FileNotFoundError):  # that stage has just ended
                note = json.loads(file.read_text())
                if name in note["command"] and note["created"] > cycle.create_time():
                    return True
        return False

    until(there, step, log=installation.home.logs / "evolve.log", pause=0.01)
    cycle.kill()
    cycle.wait()
