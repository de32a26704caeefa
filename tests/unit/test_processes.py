"""Processes of a home: found again by name, and ended with their children."""

from __future__ import annotations

import json
import sys
import time

import psutil

from tutelage.fleet import processes
from tutelage.settings import Home

PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def family(process: psutil.Process) -> list[psutil.Process]:
    for _ in range(200):
        if process.children():
            break
        time.sleep(0.02)
    return [process, *process.children(recursive=True)]


def test_a_process_is_found_by_name_and_ended_with_its_children(home: Home) -> None:
    started = family(processes.start(home, "worker", [sys.executable, "-c", PARENT]))
    assert len(started) == 2
    assert processes.find(home, "worker") is not None

    assert processes.stop(home, "worker")
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started)
    assert processes.find(home, "worker") is None


def test_one_that_ignores_sigterm_is_killed_after_its_grace(home: Home) -> None:
    process = processes.start(home, "worker", [sys.executable, "-u", "-c", STUBBORN])
    while b"up" not in (home.logs / "worker.log").read_bytes():
        time.sleep(0.02)
    processes.stop(home, "worker", grace=0.2)

    assert process.poll() is not None


def test_a_reused_process_id_is_not_taken_for_ours(home: Home) -> None:
    (home.run / "worker.json").write_text(json.dumps({"pid": psutil.Process().pid, "created": 1.0, "command": []}))

    assert processes.find(home, "worker") is None
    assert not processes.stop(home, "worker")


def test_starting_again_ends_the_one_before(home: Home) -> None:
    first = processes.start(home, "worker", [sys.executable, "-c", "import time; time.sleep(60)"])
    second = processes.start(home, "worker", [sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert first.poll() is not None
        assert second.is_running()
    finally:
        processes.stop(home, "worker")


def test_what_a_killed_process_left_in_its_session_is_ended_with_it(home: Home) -> None:
    process = processes.start(home, "worker", [sys.executable, "-c", PARENT])
    _, child = family(process)
    process.kill()
    process.wait()
    assert child.is_running()

    assert not processes.stop(home, "worker")
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_other_files_beside_the_notes_are_nobodys_process(home: Home) -> None:
    (home.run / "publish-1.json").write_text("[]")
    (home.run / "broken.json").write_text("{")

    assert processes.names(home) == []
    assert processes.find(home, "publish-1") is None
    assert not processes.stop(home, "broken")
