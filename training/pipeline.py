"""Pipeline: writes a student's `dvc.yaml` and settings beside its interactions, from the pipeline at the root.

One description of the stages for reference data and for every student. It runs nothing: `dvc repro` in the folder does.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from training import examples, settings
from training.curate import CurateSettings
from training.distill import DistillSettings
from training.evaluate import EvaluateSettings
from training.recipe import FinetuneSettings
from tutelage.settings import CHECKOUT, Strict

STAGES: dict[str, type[Strict]] = {
    "curate": CurateSettings,
    "distill": DistillSettings,
    "finetune": FinetuneSettings,
    "evaluate": EvaluateSettings,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.pipeline", description=__doc__)
    parser.add_argument("--student", type=Path, required=True, help="the folder that holds interactions.jsonl")
    parser.add_argument("--settings", type=Path, default=CHECKOUT / "configs", help="folder with the YAML of each stage")
    parser.add_argument("--frozen", type=Path, nargs="*", default=[], help="held-out JSONL of other students: never to be trained on")
    arguments = parser.parse_args()
    write(arguments.student, settings_dir=arguments.settings, frozen=arguments.frozen)
    print(f"pipeline: ready; run `dvc repro` in {arguments.student}")


def write(student_dir: Path, *, settings_dir: Path, frozen: Sequence[Path] = ()) -> None:
    """Write `dvc.yaml` and a copy of every stage's settings into `student_dir`; a stage that `settings_dir` says nothing of
    gets the shipped ones. The prompts of the `frozen` files go into `frozen.jsonl`.

    The copies are the student's own from then on: a later change of the defaults makes nothing of it stale.

    Raises:
        ConfigInvalid: a settings file holds an unknown key or a wrong value; nothing is written then.
        TrafficUnreadable: a frozen file cannot be read.
    """
    chosen = {stage: _settings_file(stage, settings_dir) for stage in STAGES}
    for stage, kind in STAGES.items():
        settings.read(kind, chosen[stage])
    pipeline = yaml.safe_load((CHECKOUT / "dvc.yaml").read_text())
    pipeline["vars"] = [{"data": "", "settings": ""}]
    pipeline["stages"] = {stage: pipeline["stages"][stage] for stage in STAGES}
    student_dir.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if chosen[stage].resolve() != (student_dir / f"{stage}.yaml").resolve():  # a student may keep its own
            shutil.copyfile(chosen[stage], student_dir / f"{stage}.yaml")
    held = [{"messages": list(row.prompt), "label": row.label} for file in frozen for row in examples.read(file)]
    (student_dir / "frozen.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held))
    (student_dir / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False, width=120))


def _settings_file(stage: str, settings_dir: Path) -> Path:
    own = settings_dir / f"{stage}.yaml"
    return own if own.exists() else CHECKOUT / "configs" / own.name


if __name__ == "__main__":
    main()
