"""What every task of a cycle needs: where state lives, a connection, and a way to run a stage as a process and say how far it is.

It refuses to know what the stages do.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tutelage.errors import TutelageError
from tutelage.fleet import processes
from tutelage.fleet.tiers import TierControl, Wanted
from tutelage.settings import CHECKOUT, Home, TierSettings, load
from tutelage.stores.database import Pool, open_pool

STORING = ("training.publish", "bentos.tier.package", "flows.review")
STORING_SECONDS = 120.0
STEP = re.compile(r"\bstep (\d+)/(\d+)")


class StageFailed(TutelageError):
    """A stage's process ended with an error; the message carries its last lines."""

    code = "stage_failed"


@dataclass(frozen=True)
class Cycle:
    """One run of the loop for one tenant. `asked`: domains that a person wants a student for; without any, the gap rule chooses."""

    id: str
    tenant_id: str
    tenant_name: str
    home: Path
    config_dir: Path
    database_url: str
    asked: tuple[str, ...] = ()

    @property
    def state(self) -> Home:
        return Home(self.home)


@asynccontextmanager
async def connected(cycle: Cycle) -> AsyncIterator[Pool]:
    pool = await open_pool(cycle.database_url, size=2)
    try:
        yield pool
    finally:
        await pool.close()


def tell(stage: str, text: str, *, student: str | None = None, done: int | None = None, total: int | None = None) -> None:
    """Say how far the cycle is: a line for people, and a JSON line in `TUTELAGE_PROGRESS` for whoever watches."""
    print(f"[{stage}] {student + ': ' if student else ''}{text}", flush=True)
    target = os.environ.get("TUTELAGE_PROGRESS")
    if target:
        with Path(target).open("a") as file:
            file.write(json.dumps({"stage": stage, "student": student, "text": text, "done": done, "total": total}) + "\n")


def load_adapter(home: Home, config_dir: Path, wanted: Wanted) -> bool:
    """Have the tier hold an adapter before anything is routed to it. False: none runs, and `serve` loads what the ledger names.

    Raises:
        AdapterRejected: the tier refuses the files.
        BackendFailed: it did not load them.
    """
    control = TierControl(f"http://127.0.0.1:{load(TierSettings, config_dir).port}", home.secret("tier_token"))
    try:
        if not control.ready():
            return False
        control.load(wanted)
        return True
    finally:
        control.close()


async def run_stage(cycle: Cycle, stage: str, arguments: Sequence[str], *, cwd: Path = CHECKOUT, student: str | None = None) -> str:
    """Run `python ARGUMENTS` to its end and return its standard output; progress lines are passed on as they come.

    The process is ended with its children when the flow is cancelled.

    Raises:
        StageFailed: it ended with an error.
    """
    environment = {
        **os.environ,
        **cycle.state.environment(),
        "PYTHONPATH": str(CHECKOUT),
        "PYTHONUNBUFFERED": "1",
        # dvc.yaml says `python`: it must be this interpreter also when no virtual environment is active
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=cwd,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        limit=1 << 20,
    )
    processes.note(cycle.state, stage_process(cycle.id), process.pid, [sys.executable, *arguments])
    try:
        lines = [line async for line in _lines(process, stage, student)]
        if await process.wait():
            raise StageFailed(f"stage {stage} failed (exit {process.returncode}): " + " | ".join(lines[-12:])[-1500:])
        return "\n".join(lines)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            await process.wait()
        processes.forget(cycle.state, stage_process(cycle.id))


def stage_process(cycle_id: str) -> str:
    """The name under which this home knows the stage that a cycle is at."""
    return f"stage-{cycle_id}"


def end_stage(home: Home, cycle_id: str) -> None:
    """End the stage that a killed cycle was at. One that writes into MLflow's or BentoML's store is given time to end by itself: cut off in
    the middle, the store might not open again."""
    running = processes.find(home, stage_process(cycle_id))
    if running is not None and any(name in running.cmdline() for name in STORING):
        with suppress(psutil.TimeoutExpired):
            running.wait(STORING_SECONDS)
    processes.stop(home, stage_process(cycle_id))


async def _lines(process: asyncio.subprocess.Process, stage: str, student: str | None) -> AsyncIterator[str]:
    if process.stdout is None:
        return
    async for raw in process.stdout:
        line = raw.decode("utf-8", "replace").rstrip()
        # every stage names itself in its lines; the rest is its libraries' talk, quoted only when it fails
        if line.startswith(f"{stage}: "):
            step = STEP.search(line)
            done, total = (int(step[1]), int(step[2])) if step else (None, None)
            tell(stage, line.removeprefix(f"{stage}: "), student=student, done=done, total=total)
        yield line
