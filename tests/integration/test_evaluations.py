"""`tutelage replay` and `tutelage domain-eval` as a shell sees them, with the real encoder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tutelage.settings import CHECKOUT

SUMS = [f"What is {i} plus {i * 7 % 90}?" for i in range(80)]
COLOURS = [
    f"Name a colour that goes well with {word} number {i}."
    for i in range(10)
    for word in ("red", "blue", "green", "grey", "pink", "gold", "teal", "lime")
]


@pytest.fixture
def home(tmp_path: Path, encoder: Path) -> Path:
    (tmp_path / "home/models").mkdir(parents=True)
    (tmp_path / "home/models/encoder").symlink_to(encoder)
    return tmp_path / "home"


def tutelage(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tutelage.cli", *arguments, "--home", str(home)]
    return subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, check=False)


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_replay_writes_the_report_and_a_page_and_prints_a_table(home: Path, tmp_path: Path) -> None:
    """The weak model can add and knows no colours."""
    rows = [{"prompt": p, "weak_correct": True, "strong_correct": True} for p in SUMS]
    rows += [{"prompt": p, "weak_correct": False, "strong_correct": True} for p in COLOURS]
    log = write(tmp_path / "log.jsonl", rows)
    done = tutelage(home, "replay", log, "--report", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert "always-strong" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["policies"][report["default"]]["apgr"] > 0.7
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_a_bad_row_is_one_line_on_stderr(home: Path, tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [{"prompt": "x"}])
    done = tutelage(home, "replay", log, "--report", str(tmp_path / "report.json"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"tutelage: {log}:1: neither `scores` nor")
    assert not (tmp_path / "report.json").exists()


def test_domain_eval_reports_its_four_figures(home: Path, tmp_path: Path) -> None:
    rows = [{"prompt": p, "domain": "sums"} for p in SUMS] + [{"prompt": p, "domain": "colours"} for p in COLOURS]
    fit, data = write(tmp_path / "fit.jsonl", rows[::2]), write(tmp_path / "data.jsonl", rows[1::2])
    oos = write(tmp_path / "oos.jsonl", [{"prompt": f"Translate proverb {i} into Latin", "domain": "oos"} for i in range(20)])
    done = tutelage(home, "domain-eval", "--fit", fit, "--data", data, "--oos", oos, "--report", str(tmp_path / "r.json"), "--json")
    assert done.returncode == 1  # 80 labelled rows are too few, and it says so
    assert "at least 100" in done.stderr
    fit = write(tmp_path / "fit.jsonl", rows)
    done = tutelage(home, "domain-eval", "--fit", fit, "--data", data, "--oos", oos, "--report", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stderr
    assert "oos_auroc" in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["accuracy"] > 0.95
    assert report["oos_auroc"] > 0.9
    assert report["nmi_unlabelled"] > 0.5
