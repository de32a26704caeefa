"""Publishing into an MLflow registry on SQLite: what a reviewer finds there, once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import build_tiny_adapter, build_tiny_base

from inference import adapters, base
from training.publish import Job, publish, read_jobs
from tutelage.errors import ConfigInvalid
from tutelage.settings import Home

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home whose MLflow is this process's."""
    home = Home(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as environment:
        for key, value in home.environment().items():
            environment.setenv(key, value)
        import mlflow

        mlflow.set_tracking_uri(home.environment()["MLFLOW_TRACKING_URI"])
        yield home
        mlflow.set_tracking_uri("")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's folder as the other stages leave it."""
    folder = tmp_path_factory.mktemp("student")
    tiny = build_tiny_base(folder / "base")
    digest = build_tiny_adapter(tiny, folder / "adapter")
    manifest = {
        "base": "tiny",
        "base_fingerprint": base.fingerprint(tiny),
        "adapter_digest": digest,
        "template_hash": "t",
        "data_digest": "d",
        "settings": {"rank": 4, "seed": 0},
        "metrics": {"steps": 2},
        "versions": {"torch": "2"},
    }
    (folder / "distilled").mkdir()
    (folder / "distilled" / "train.jsonl").write_text('{"prompt": "1+1", "label": "2"}\n')
    (folder / "adapter" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "report.json").write_text(json.dumps({"n": 40, "accuracy": 0.9, "learnable": True, "wilson95": [0.8, 0.95]}))
    (folder / "curve.csv").write_text("step,loss,val_accuracy\n1,2.0,\n2,1.0,0.5\n")
    return folder


def job(student: Path, name: str, decision: str, **more: Any) -> Job:
    verdict = {"decision": decision, "reason": f"{decision} because", "evidence": {"n": 40}}
    return Job.model_validate({"student_dir": student, "name": name, "version": 1, "verdict": verdict, **more})


def client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient()


def test_a_promoted_student_can_be_found_reviewed_and_downloaded(home: Home, student: Path) -> None:
    import mlflow

    [entry] = publish([job(student, "acme-sums", "promoted", description_markdown="# Sums", tags={"tenant": "acme"})])
    version = client().get_model_version("acme-sums", entry.version)
    assert str(version.version) == entry.version
    assert version.description == "# Sums"
    assert version.tags["verdict"] == "promoted"
    assert version.tags["tenant"] == "acme"
    run = client().get_run(entry.run_id)
    assert run.data.metrics["accuracy"] == 0.9
    assert (run.data.params["rank"], run.data.params["version.torch"]) == ("4", "2")
    [used] = run.inputs.dataset_inputs
    data = (student / "distilled" / "train.jsonl").read_bytes()
    assert {tag.key: tag.value for tag in used.tags} == {
        "mlflow.data.context": "training",
        "rows": "1",
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    [model] = client().search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{entry.run_id}'")
    assert "messages" in json.loads(model.tags["signature"])["inputs"]
    assert [point.value for point in client().get_metric_history(entry.run_id, "curve/loss")] == [2.0, 1.0]
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/acme-sums/{entry.version}"))
    assert adapters.digest(folder) == adapters.digest(student / "adapter")
    assert folder.is_relative_to(home.root)


def test_a_refused_student_is_there_with_its_reason_and_aliases_are_left_to_the_ledger(home: Home, student: Path) -> None:
    [entry] = publish([job(student, "acme-spelling", "refused")])
    version = client().get_model_version("acme-spelling", entry.version)
    assert (version.tags["verdict"], version.tags["reason"]) == ("refused", "refused because")
    assert version.description == "refused because"
    assert client().get_registered_model("acme-spelling").aliases == {}


def test_publishing_again_changes_words_but_adds_no_version(home: Home, student: Path) -> None:
    first = publish([job(student, "acme-twice", "kept")])
    again = publish([job(student, "acme-twice", "promoted")])
    assert first == again
    [version] = client().search_model_versions("name='acme-twice'")
    assert version.tags["verdict"] == "promoted"


def test_a_faulty_job_is_named(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"student_dir": "x", "name": "a b", "version": 0, "verdict": {"decision": "maybe", "reason": ""}}]))
    with pytest.raises(ConfigInvalid, match=r"0\.name.*0\.version.*0\.verdict\.decision"):
        read_jobs(jobs)
