"""`tutelage cache-eval` as a shell sees it, on generated rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tutelage.settings import CHECKOUT, Home

THINGS = ["router", "printer", "modem", "phone", "camera", "laptop", "tablet", "speaker", "monitor", "keyboard"]
DEEDS = [
    "reset",
    "clean",
    "repair",
    "install",
    "update",
    "sell",
    "carry",
    "paint",
    "store",
    "test",
    "open",
    "ship",
    "charge",
    "hide",
    "lock",
    "wash",
]


def run(home: Home, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tutelage.cli", "cache-eval", "--home", str(home.root), *arguments]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def generated() -> list[dict[str, Any]]:
    """Each deed and thing once in other words, and once with another deed."""
    rows = []
    for d, deed in enumerate(DEEDS):
        for thing in THINGS:
            asked = f"How do I {deed} a {thing}?"
            rows.append({"text_a": asked, "text_b": f"What is the best way to {deed} the {thing}?", "label": 1})
            rows.append({"text_a": asked, "text_b": f"How do I {DEEDS[d - 1]} a {thing}?", "label": 0})
    return rows


@pytest.fixture
def prepared(home: Home, encoder: Path) -> Home:
    home.models.joinpath("encoder").symlink_to(encoder)
    return home


def test_pairs_are_ranked_served_and_set_beside_a_bare_cosine(prepared: Home, tmp_path: Path) -> None:
    data, report = write(tmp_path / "pairs.jsonl", generated()), tmp_path / "report.json"
    done = run(prepared, "--pairs", data, "--fit", data, "--halves", "1", "--report", str(report))
    assert done.returncode == 0, done.stderr
    told = json.loads(report.read_text())

    assert told["fitted"] and told["n"] == 320
    assert told["ap"] > 0.95 and 0 < told["minilm_cosine"]["ap"] <= 1
    assert {"recall_at_p90", "hit_rate", "false_hit_rate", "operating_points", "guards", "majority"} <= set(told)
    assert told["halves"]["n"] == 1
    assert report.with_suffix(".svg").read_text().lstrip().startswith("<?xml")
    assert "average precision" in done.stdout


def test_every_origin_is_stored_and_every_similar_asked(prepared: Home, tmp_path: Path) -> None:
    rows = [{"origin": row["text_a"], "similar": row["text_b"]} for row in generated() if row["label"]][:40]
    report = tmp_path / "report.json"
    done = run(prepared, "--pairs", write(tmp_path / "rows.jsonl", rows), "--report", str(report))
    assert done.returncode == 0, done.stderr
    told = json.loads(report.read_text())

    assert not told["fitted"]
    for point in (*told["operating_points"], *told["minilm_cosine"]["operating_points"]):
        assert point["correct"] + point["wrong"] + point["miss"] == 40
    assert max(point["correct"] for point in told["operating_points"]) > 30


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: not JSON"),
        ('{"text_a": "x", "text_b": "y", "label": 7}', "line 2: 'label' is 7"),
        ('{"text_a": "x"}', "line 2: 'text_b'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(home: Home, tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text_a": "x", "text_b": "y", "label": 1}\n' + line + "\n")
    done = run(home, "--pairs", str(path), "--report", str(tmp_path / "r.json"))
    assert done.returncode == 1
    assert f"{path}, {told}" in done.stderr
