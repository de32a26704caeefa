"""The command line as a shell sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tutelage.settings import CHECKOUT


def test_a_reader_that_has_seen_enough_is_no_fault(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "tutelage.cli", "env", "--home", str(tmp_path)]
    command = subprocess.Popen(line, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None
    command.stdout.close()
    assert command.wait(60) == 0
    assert command.stderr is not None
    assert command.stderr.read() == b""
