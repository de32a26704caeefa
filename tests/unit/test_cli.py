"""The command line as a shell sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tutelage import cli, operations
from tutelage.fleet import processes
from tutelage.settings import CHECKOUT, Home


def test_a_reader_that_has_seen_enough_is_no_fault(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "tutelage.cli", "env", "--home", str(tmp_path)]
    command = subprocess.Popen(line, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None
    command.stdout.close()
    assert command.wait(60) == 0
    assert command.stderr is not None
    assert command.stderr.read() == b""


def test_gaps_lists_and_spawn_begins_a_cycle_for_the_named_ones_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(operations, "run", lambda _home, name, arguments: asked.append((name, getattr(arguments, "domain", []))) or [])
    monkeypatch.setattr(processes, "run_attached", lambda _home, name, command, **_: asked.append((name, command[5:])) or 0)
    home = ["--home", str(tmp_path)]

    assert cli.main(["gaps", "--json", *home]) == 0
    assert cli.main(["gaps", "spawn", "sums", "dates", "--tenant", "acme", *home]) == 0
    assert asked == [
        ("gaps", []),
        ("check_proposed", ["sums", "dates"]),
        ("evolve", ["--tenant", "acme", "--spawn", "sums", "dates"]),
    ]


def test_a_second_cycle_by_hand_does_not_end_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Home(tmp_path)
    processes.note(home, "evolve", os.getpid(), ["a cycle"])

    assert cli.main(["evolve", "--home", str(tmp_path)]) == 1
    assert "is running; wait for it to end" in capsys.readouterr().err
