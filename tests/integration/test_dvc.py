"""A student under `dvc repro`: nothing is done twice, and a changed setting re-runs exactly what depends on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import build_tiny_base

from inference import base
from training import pipeline
from tutelage.errors import ConfigInvalid
from tutelage.settings import CHECKOUT, Home

pytestmark = pytest.mark.slow
STAGES = ["curate", "distill", "finetune", "evaluate"]


def environment(home: Home) -> dict[str, str]:
    here = str(Path(sys.executable).parent)
    return os.environ | home.environment() | {"PYTHONPATH": str(CHECKOUT), "PATH": f"{here}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def dvc(folder: Path, home: Home, *arguments: str) -> str:
    done = subprocess.run(["dvc", *arguments], cwd=folder, env=environment(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ran(output: str) -> list[str]:
    return [stage for stage in STAGES if f"Running stage '{stage}'" in output]


def set_value(file: Path, key: str, value: float) -> None:
    lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines) + "\n")


@pytest.fixture
def student(home: Home, encoder: Path) -> Path:
    """A student's folder with 120 easy interactions, in a home whose base is tiny."""
    build_tiny_base(home.models / base.NAME)
    (home.models / "encoder").symlink_to(encoder)
    dvc(home.students, home, "init", "--no-scm", "-q")
    folder = home.students / "acme-colours" / "v1"
    pipeline.write(folder, settings_dir=CHECKOUT / "configs")
    answers = {"red": "yes", "green": "sports", "blue": "no"}
    rows = [{"prompt": f"Which category is {colour} number {i}?", "label": answer} for i in range(40) for colour, answer in answers.items()]
    (folder / "interactions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for key, value in (("learning_rate", 0.01), ("budget_tokens", 4000), ("probe_tokens", 1500)):
        set_value(folder / "finetune.yaml", key, value)
    return folder


def test_repro_runs_what_is_stale_and_nothing_else(student: Path, home: Home) -> None:
    assert ran(dvc(student, home, "repro")) == STAGES
    report = json.loads((student / "report.json").read_text())
    assert report["accuracy"] > report["majority"]
    assert ran(dvc(student, home, "repro")) == []
    assert json.loads(dvc(student, home, "metrics", "show", "--json"))
    assert '"confidence"' in dvc(student, home, "plots", "show", "--show-vega", "reliability.csv")
    set_value(student / "evaluate.yaml", "threshold", 0.9)
    assert ran(dvc(student, home, "repro")) == ["evaluate"]


def test_another_held_out_set_makes_curation_stale(student: Path, home: Home, tmp_path: Path) -> None:
    dvc(student, home, "repro", "curate")
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "Which category is red number 1?", "label": "yes"}) + "\n")
    pipeline.write(student, settings_dir=student, frozen=[held])
    assert ran(dvc(student, home, "repro", "curate")) == ["curate"]
    kept = (student / "curated" / "train.jsonl").read_text() + (student / "curated" / "validation.jsonl").read_text()
    assert "red number 1?" not in kept


def test_settings_with_a_fault_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    settings = tmp_path / "configs"
    settings.mkdir()
    for stage in STAGES:
        (settings / f"{stage}.yaml").write_text("")
    (settings / "finetune.yaml").write_text("learning_rat: 0.001\n")
    with pytest.raises(ConfigInvalid, match="learning_rat"):
        pipeline.write(tmp_path / "student", settings_dir=settings)
    assert not (tmp_path / "student").exists()


def test_the_settings_that_are_shipped_are_the_defaults_of_the_code() -> None:
    from training import settings

    for stage, kind in pipeline.STAGES.items():
        assert settings.read(kind, CHECKOUT / "configs" / f"{stage}.yaml") == kind()
