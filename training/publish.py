"""Publish: put finished students into the MLflow registry, promoted and refused ones alike, for people to review.

Reads what the other stages wrote and what the gate decided; it decides nothing itself and never moves the champion: that is
the ledger's. One process for all jobs, since importing MLflow takes seconds. Publishing the same student twice changes
nothing but its tags and description.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from tutelage.errors import ConfigInvalid
from tutelage.settings import Home, Strict
from tutelage.stores.datasets import read_curve

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

EXPERIMENT = "students"
DIGEST, VERSION = "tutelage.adapter_digest", "tutelage.student_version"
ARTIFACTS = (
    "report.json", "curated/report.json", "distilled/report.json", "distilled/train.jsonl.manifest.json", "curve.csv", "reliability.csv",
    "dvc.yaml", "dvc.lock",
)  # fmt: skip
DATASETS = {
    "interactions": "interactions.jsonl", "training": "distilled/train.jsonl", "validation": "curated/validation.jsonl",
    "calibration": "curated/calibration.jsonl", "test": "curated/test.jsonl",
}  # fmt: skip
MAX_TAG = 5000  # characters; MLflow refuses longer values


class Verdict(Strict):
    """What the gate decided and on what evidence."""

    decision: Literal["promoted", "kept", "refused", "challenges", "waits"]
    reason: str
    evidence: Mapping[str, Any] = Field(default_factory=dict)


class Job(Strict):
    """One student version to publish; `student_dir` is where `dvc repro` ran."""

    student_dir: Path
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,200}$")
    version: int = Field(ge=1)
    verdict: Verdict
    description_markdown: str = ""
    tags: Mapping[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """Where a student stands in the registry; `version` is MLflow's own number, `url_fragment` its page in the UI."""

    name: str
    version: str
    run_id: str
    url_fragment: str


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.publish", description=__doc__)
    parser.add_argument("--jobs", type=Path, required=True, help="JSON list of jobs, see Job in this file")
    arguments = parser.parse_args()
    published = publish(read_jobs(arguments.jobs))
    print(json.dumps([asdict(entry) for entry in published]))


def read_jobs(file: Path) -> list[Job]:
    """The jobs in a JSON file. Raises ConfigInvalid naming every fault."""
    try:
        return TypeAdapter(list[Job]).validate_json(file.read_bytes())
    except OSError as missing:
        raise ConfigInvalid(f"cannot read {file}: {missing.strerror}; pass a JSON list of jobs to --jobs") from missing
    except ValidationError as broken:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in broken.errors())
        raise ConfigInvalid(f"{file}: {faults}") from broken


def publish(jobs: list[Job]) -> list[Published]:
    """Publish every job to the registry that MLFLOW_TRACKING_URI names, in order."""
    # read by MLflow when it is imported
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = _experiment(client)
    return [_publish(client, experiment, job) for job in jobs]


def _publish(client: MlflowClient, experiment: str, job: Job) -> Published:
    manifest = json.loads((job.student_dir / "adapter" / "manifest.json").read_text())
    version, run_id = _find(client, job, manifest["adapter_digest"]) or _register(client, experiment, job, manifest)
    for key, value in _tags(job, manifest).items():
        client.set_model_version_tag(job.name, version, key, value[:MAX_TAG])
    client.update_model_version(job.name, version, job.description_markdown or job.verdict.reason)
    return Published(job.name, version, run_id, f"#/models/{job.name}/versions/{version}")


def _find(client: MlflowClient, job: Job, digest: str) -> tuple[str, str] | None:
    """The registered version of this very adapter, if an earlier run got that far."""
    query = f"name='{job.name}' and tags.`{DIGEST}`='{digest}' and tags.`{VERSION}`='{job.version}'"
    found = client.search_model_versions(query, max_results=1)
    return (str(found[0].version), str(found[0].run_id)) if found else None


def _register(client: MlflowClient, experiment: str, job: Job, manifest: dict[str, Any]) -> tuple[str, str]:
    """A run with figures and curve, a logged model with the adapter's files, and a model version that points to it."""
    import mlflow
    from mlflow.entities import LoggedModelStatus

    report = json.loads((job.student_dir / "report.json").read_text())
    run = client.create_run(experiment, run_name=f"{job.name}-v{job.version}", tags={VERSION: str(job.version)})
    run_id = run.info.run_id
    model = client.create_logged_model(
        experiment,
        name=f"{job.name}-v{job.version}",
        source_run_id=run_id,
        model_type="peft-lora",
        tags={"base": manifest["base"], "base_fingerprint": manifest["base_fingerprint"], "signature": _signature()},
    )
    _log_figures(client, run_id, job.student_dir, manifest, _numbers(report), model_id=model.model_id)
    client.log_inputs(run_id, datasets=_datasets(job.student_dir))
    client.log_model_artifacts(model.model_id, str(job.student_dir / "adapter"))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.set_terminated(run_id)
    # tags belong to the creation: a crash right after it must not leave a version that `_find` cannot see
    identity = {DIGEST: manifest["adapter_digest"], VERSION: str(job.version)}
    version = mlflow.register_model(f"models:/{model.model_id}", job.name, tags=identity)
    return str(version.version), run_id


def _log_figures(
    client: MlflowClient, run_id: str, student_dir: Path, manifest: dict[str, Any], judged: dict[str, float], *, model_id: str
) -> None:
    """The curve by step, the last figures on run and model alike, the settings, and the files they come from."""
    from mlflow.entities import Metric, Param

    metrics = [Metric(f"curve/{key}", value, 0, step) for step, key, value in _curve(student_dir / "curve.csv")]
    metrics += [Metric(key, value, 0, 0, model_id=model_id) for key, value in {**manifest["metrics"], **judged}.items()]
    for start in range(0, len(metrics), 1000):  # MLflow takes a thousand a call
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    versions = {f"version.{name}": version for name, version in manifest.get("versions", {}).items()}
    params = {**manifest["settings"], **versions, "base": manifest["base"], "data_digest": manifest["data_digest"]}
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
    for name in ARTIFACTS:
        if (student_dir / name).exists():
            client.log_artifact(run_id, str(student_dir / name), artifact_path=str(Path(name).parent) if "/" in name else None)


def _datasets(student_dir: Path) -> list[DatasetInput]:
    """Every file the student was made from and judged on, by its digest; the run thus says which interactions it stands on."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for context, name in DATASETS.items():
        file = student_dir / name
        if file.exists():
            content = file.read_bytes()
            dataset = Dataset(name, hashlib.sha256(content).hexdigest()[:36], "local", json.dumps({"uri": file.as_uri()}))
            told = {"mlflow.data.context": context, "rows": str(content.count(b"\n")), "sha256": hashlib.sha256(content).hexdigest()}
            inputs.append(DatasetInput(dataset, [InputTag(key, value) for key, value in told.items()]))
    return inputs


def _signature() -> str:
    """What the model takes and gives, as MLflow writes it: a conversation in, text out."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

    turn = Object([Property("role", DataType.string), Property("content", DataType.string)])
    signature = ModelSignature(Schema([ColSpec(Array(turn), "messages")]), Schema([ColSpec(DataType.string, "content")]))
    return json.dumps(signature.to_dict())


def _numbers(report: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in report.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def _curve(file: Path) -> list[tuple[int, str, float]]:
    return [(int(row["step"]), key, value) for row in read_curve(file) for key, value in row.items() if key != "step"]


def _tags(job: Job, manifest: Mapping[str, Any]) -> dict[str, str]:
    """What a reviewer filters by; the job's own tags win."""
    return {
        "verdict": job.verdict.decision,
        "reason": job.verdict.reason,
        "evidence": json.dumps(job.verdict.evidence, sort_keys=True),
        "base": manifest["base"],
        "base_fingerprint": manifest["base_fingerprint"],
        "template_hash": manifest["template_hash"],
        "data_digest": manifest["data_digest"],
        DIGEST: manifest["adapter_digest"],
        VERSION: str(job.version),
        **job.tags,
    }


def _experiment(client: MlflowClient) -> str:
    """The experiment all students share; with MLflow's own SQLite its files go under home and not into the current folder."""
    from mlflow.tracking import get_tracking_uri

    found = client.get_experiment_by_name(EXPERIMENT)
    if found:
        return str(found.experiment_id)
    local = get_tracking_uri().startswith("sqlite:")
    location = (Home.from_environment().folder("mlflow") / "artifacts").as_uri() if local else None
    return str(client.create_experiment(EXPERIMENT, artifact_location=location))


if __name__ == "__main__":
    main()
