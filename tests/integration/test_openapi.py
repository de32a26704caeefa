"""/openapi.json is true: schemathesis makes requests from it, right ones and wrong ones, and checks every answer against it.

A key that may do much ends others and itself before long, so what ends keys is asked last, by itself.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.replicas import Party, Replica, Site, enroll

pytestmark = pytest.mark.slow
SETTINGS = Path(__file__).parent.parent / "schemathesis.toml"
ENDING = "/rotate$|/revoke$"


@pytest.fixture(scope="module")
def party(standing: tuple[Site, Replica]) -> Party:
    made = asyncio.run(enroll(standing[0], "described"))
    standing[1].wait(key=made.key)
    return made


@pytest.mark.parametrize(
    ("who", "chosen"),
    [
        ("key", ["--exclude-path-regex", "/admin/"]),
        ("administrator", ["--include-path-regex", "/admin/", "--exclude-path-regex", ENDING]),
        ("operator", ["--include-path-regex", "/admin/", "--exclude-path-regex", ENDING]),
        ("operator", ["--include-path-regex", ENDING]),
    ],
)
def test_every_answer_is_as_the_description_says(
    standing: tuple[Site, Replica], party: Party, tmp_path: Path, who: str, chosen: list[str]
) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(SETTINGS), "run", f"{standing[1].url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {getattr(party, who)}", "--checks", "all", "--continue-on-failure", "--no-color"]
    command += ["--seed", "1", "--max-examples", "2", "--request-timeout", "20", *chosen]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    tried = re.search(r"(\d+) generated", done.stdout)
    assert tried is not None
    assert int(tried[1]) >= 50
