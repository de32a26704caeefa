"""Knowledge distillation from Python: recorded answers in, a trained and examined student out.

    from tutelage.distillation import DistillationConfig, KnowledgeDistillation

    distillation = KnowledgeDistillation(DistillationConfig(distillation_strategy="response"), interactions="interactions.jsonl")
    student = distillation.distill_knowledge("models/smollm2-135m-instruct", "support-triage")
    print(student.accuracy, student.majority)
    distillation.export_training_data("train.jsonl", format="openai")

The same stages as an evolution cycle (curate, distill, finetune, evaluate) run as processes, so nothing heavy is imported here. It refuses
to decide whether a student is good enough to serve: that is the gate's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from tutelage.errors import InvalidRequest, TutelageError
from tutelage.settings import CHECKOUT, Home, Strict

Strategy = Literal["response", "soft-targets", "reasoning", "metric-aware", "multi-aspect"]
LAST_LINES = 12


class StageFailed(TutelageError):
    """A stage's process ended with an error; the message carries its last lines."""

    code = "stage_failed"


class DistillationConfig(Strict):
    """`temperature` and `alpha` weigh the teacher's log-probabilities against the words, where there are log-probabilities.

    `min_teacher_confidence`: answers the teacher was known to be less sure of are left out; null keeps them. `batch_size`: examples of an
    optimiser step at least. `stages`: further settings by stage, as in configs/ (such as {"finetune": {"budget_tokens": 4000}}).
    """

    temperature: float = Field(default=2.0, gt=0)
    alpha: float = Field(default=0.7, ge=0, le=1)
    distillation_strategy: Strategy = "multi-aspect"
    min_teacher_confidence: float | None = Field(default=0.85, ge=0, le=1)
    batch_size: int = Field(default=16, ge=1)
    num_epochs: int = Field(default=1, ge=1)
    stages: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class DistilledStudent:
    """A trained student: where its files are, what it is worth on held-out items, and the report of every stage."""

    student_id: str
    folder: str
    adapter: str
    adapter_digest: str
    accuracy: float
    majority: float
    wilson95: tuple[float, float]
    reports: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class KnowledgeDistillation:
    """Distils what a teacher answered into students.

    `interactions`: a JSONL file in the export format, or its rows; each distillation reads them afresh. `home`: the state folder (default:
    TUTELAGE_HOME), where students are written.
    """

    def __init__(
        self,
        config: DistillationConfig | None = None,
        *,
        interactions: str | Path | Sequence[Mapping[str, Any]] = (),
        home: str | Path | None = None,
    ) -> None:
        self.config = config or DistillationConfig()
        self.home = Home.from_environment(str(home) if home else None)
        self._interactions = interactions
        self._newest: Path | None = None

    def distill_knowledge(self, student_model: str | Path, student_id: str) -> DistilledStudent:
        """Curate, distil, train and examine the student `student_id` of the base in the folder `student_model`.

        A second call with the same id makes its next version.

        Raises:
            InvalidRequest: the id is no plain name, the base is no folder or there are no interactions.
            StageFailed: a stage refused its input or failed; the message says which and why.
        """
        if not student_id.replace("-", "").replace("_", "").isalnum():
            raise InvalidRequest(f"student_id {student_id!r}: letters, digits, dashes and underscores are allowed")
        base = Path(student_model).resolve()
        if not (base / "config.json").is_file():
            raise InvalidRequest(f"student_model {student_model!r}: the folder of a base model is expected, with its config.json")
        folder = self._fresh_folder(student_id)
        self._write_interactions(folder / "interactions.jsonl")
        self._write_settings(folder)
        data = {name: str(folder / "curated" / f"{name}.jsonl") for name in ("train", "validation", "calibration", "test")}
        learned, adapter = str(folder / "distilled" / "train.jsonl"), str(folder / "adapter")
        self._stage("curate", folder, "--data", str(folder / "interactions.jsonl"), "--out", str(folder / "curated"))
        self._stage("distill", folder, "--data", data["train"], "--out", str(folder / "distilled"), "--base", str(base))
        self._newest = Path(learned)
        curve = ("--curve", str(folder / "curve.csv"))
        self._stage(
            "finetune", folder, "--data", learned, "--validation", data["validation"], "--out", adapter, "--base", str(base), *curve
        )
        judged = ("--data", data["test"], "--calibration", data["calibration"], "--train", data["train"])
        self._stage("evaluate", folder, "--adapter", adapter, *judged, "--report", str(folder / "report.json"), "--base", str(base))
        return _student(student_id, folder)

    def export_training_data(self, output_path: str | Path, format: str = "jsonl") -> dict[str, Any]:
        """Write what the newest student learned from (before any: the interactions) as jsonl, openai, preference or parquet.

        Raises StageFailed when the format is unknown or no row fits it.
        """
        data = self._newest
        if data is None:
            data = self.home.run / "export-interactions.jsonl"
            self._write_interactions(data)
        told = self._run("export", "--data", str(data), "--out", str(Path(output_path).resolve()), "--format", format)
        return {"path": str(output_path), "format": format, "told": told.strip().splitlines()[-1]}

    def _fresh_folder(self, student_id: str) -> Path:
        root = self.home.students / student_id
        version = 1 + max((int(p.name[1:]) for p in root.glob("v*") if p.name[1:].isdigit()), default=0)
        folder = root / f"v{version}"
        folder.mkdir(parents=True)
        return folder

    def _write_interactions(self, target: Path) -> None:
        given = self._interactions
        text = Path(given).read_text() if isinstance(given, str | Path) else "".join(json.dumps(dict(row)) + "\n" for row in given)
        if not text.strip():
            raise InvalidRequest("there are no interactions to learn from; pass `interactions`: a JSONL file or rows of prompt and label")
        target.write_text(text)

    def _write_settings(self, folder: Path) -> None:
        """The shipped settings of every stage, with this configuration's values in their places."""
        config = self.config
        own: dict[str, dict[str, Any]] = {
            "curate": {"min_teacher_confidence": config.min_teacher_confidence},
            "distill": {"strategy": config.distillation_strategy},
            "finetune": {
                "strategy": config.distillation_strategy, "distill_temperature": config.temperature, "distill_alpha": config.alpha,
                "step_examples": config.batch_size, "max_epochs": config.num_epochs, "budget_tokens": None,
            },
            "evaluate": {},
        }  # fmt: skip
        for stage, values in own.items():
            shipped = yaml.safe_load((CHECKOUT / "configs" / f"{stage}.yaml").read_text())
            chosen = {**shipped, **values, **self.config.stages.get(stage, {})}
            (folder / f"{stage}.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False))

    def _stage(self, stage: str, folder: Path, *arguments: str) -> None:
        self._run(stage, *arguments, "--config", str(folder / f"{stage}.yaml"))

    def _run(self, stage: str, *arguments: str) -> str:
        environment = {**os.environ, **self.home.environment(), "PYTHONPATH": str(CHECKOUT)}
        command = [sys.executable, "-m", f"training.{stage}", *arguments]
        done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            told = (done.stdout + done.stderr).strip().splitlines()[-LAST_LINES:]
            raise StageFailed(f"stage {stage} failed (exit {done.returncode}): " + " | ".join(told))
        return done.stdout


def _student(student_id: str, folder: Path) -> DistilledStudent:
    manifest = json.loads((folder / "adapter" / "manifest.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    reports = {name: json.loads((folder / name / "report.json").read_text()) for name in ("curated", "distilled")}
    return DistilledStudent(
        student_id=student_id,
        folder=str(folder),
        adapter=str(folder / "adapter"),
        adapter_digest=manifest["adapter_digest"],
        accuracy=report["accuracy"],
        majority=report["majority"],
        wilson95=(report["wilson95"][0], report["wilson95"][1]),
        reports={**reports, "evaluated": report},
    )
