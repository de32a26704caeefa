"""The processes of one home: started in their own session, known by a file each, ended without leaving any behind.

A file `run/<name>.json` holds the process id and its start time, so that a later command finds (or ends) what a killed one left.
It refuses to know what a process does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tutelage.settings import CHECKOUT, Home

GRACE_SECONDS = 20.0


def start(home: Home, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> psutil.Popen:
    """Start `command` as this home's process `name`, output appended to `logs/<name>.log`; an older one of that name is ended first."""
    stop(home, name)
    with (home.logs / f"{name}.log").open("ab") as log:
        process = psutil.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=CHECKOUT,
            env={**os.environ, **home.environment(), **(environment or {})},
            start_new_session=True,  # a Ctrl-C at the terminal reaches our command only, which then ends its children in order
        )
    note(home, name, process.pid, command)
    return process


def note(home: Home, name: str, pid: int, command: Sequence[str]) -> None:
    """Remember a running process of this home, so that a later command finds it and what it leaves."""
    _write(_file(home, name), {"pid": pid, "created": psutil.Process(pid).create_time(), "command": list(command)})


def python(*arguments: str) -> list[str]:
    """A command line that runs this interpreter."""
    return [sys.executable, *arguments]


def find(home: Home, name: str) -> psutil.Process | None:
    """The running process of that name, if any."""
    fact = _noted(home, name)
    with contextlib.suppress(psutil.Error):
        if fact is None:
            return None
        process = psutil.Process(int(fact["pid"]))
        # process ids are reused: the start time tells them apart
        if abs(process.create_time() - float(fact["created"])) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def names(home: Home) -> list[str]:
    """Every name this home has a note of, running or not; other files may lie there too."""
    return sorted(path.stem for path in home.run.glob("*.json") if _noted(home, path.stem) is not None)


def stop(home: Home, name: str, *, grace: float = GRACE_SECONDS) -> bool:
    """End the process and all it started: SIGTERM, and SIGKILL to what is left after `grace` seconds. True when one was running."""
    process = find(home, name)
    if process is not None:
        end(process, grace=grace)
    else:
        _end_orphans(home, name, grace=grace)
    _file(home, name).unlink(missing_ok=True)
    return process is not None


def end(process: psutil.Process, *, grace: float = GRACE_SECONDS) -> None:
    """End one process and its descendants."""
    family = [process, *_descendants(process)]
    with contextlib.suppress(psutil.Error):
        process.terminate()
    _, alive = psutil.wait_procs([process], timeout=grace)
    # children that outlived their parent, and the parent if it would not go
    for member in {*alive, *(m for m in family if m.is_running())}:
        with contextlib.suppress(psutil.Error):
            member.kill()
    psutil.wait_procs(family, timeout=5)


@contextlib.contextmanager
def run(home: Home, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Iterator[psutil.Popen]:
    """A process for the length of a block: ended with all its children however the block is left."""
    process = start(home, name, command, environment=environment)
    try:
        yield process
    finally:
        stop(home, name)


def on_terminate_raise() -> None:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C, so that `finally` ends the children; a second signal must not cut that short."""
    seen = False

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal seen
        if not seen:
            seen = True
            raise KeyboardInterrupt
        print("ending what was started; this takes a moment", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def _end_orphans(home: Home, name: str, *, grace: float) -> None:
    """End what a process that was killed left in the session that it led."""
    fact = _noted(home, name)
    if fact is None:
        return
    with contextlib.suppress(OSError):
        leader, since = int(fact["pid"]), float(fact["created"])
        if leader == os.getsid(0) or (psutil.pid_exists(leader) and psutil.Process(leader).status() != psutil.STATUS_ZOMBIE):
            return  # the number was given to another process since, so its session had ended
        for process in psutil.process_iter(["create_time"]):
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == leader and process.info["create_time"] >= since - 1 and process.pid != leader:
                    end(process, grace=grace)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def _noted(home: Home, name: str) -> dict[str, Any] | None:
    """What `note` wrote under that name; None where it did not."""
    with contextlib.suppress(OSError, ValueError):
        fact = json.loads(_file(home, name).read_text())
        if isinstance(fact, dict) and {"pid", "created"} <= fact.keys():
            return fact
    return None


def _file(home: Home, name: str) -> Path:
    return home.run / f"{name}.json"


def _write(path: Path, fact: dict[str, object]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(fact))
    new.replace(path)


def claim(home: Home, name: str) -> None:
    """Note the running process itself under that name."""
    note(home, name, os.getpid(), sys.argv)


def release(home: Home, name: str) -> None:
    """Forget the running process's own note."""
    found = find(home, name)
    if found is None or found.pid == os.getpid():
        forget(home, name)


def forget(home: Home, name: str) -> None:
    """Drop the note of a process that has ended by itself."""
    _file(home, name).unlink(missing_ok=True)


def run_attached(home: Home, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> int:
    """Run a command whose output is ours, to its end; ended with all its children when we are interrupted. Its exit status."""
    stop(home, name)
    process = psutil.Popen(
        list(command), cwd=CHECKOUT, env={**os.environ, **home.environment(), **(environment or {})}, start_new_session=True
    )
    note(home, name, process.pid, command)
    try:
        return int(process.wait())
    finally:
        stop(home, name)
