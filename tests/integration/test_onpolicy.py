"""A student corrected on its own answers comes nearer to its teacher, and what it becomes is an adapter like any."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from fakes import build_tiny_base

from inference import adapters, base
from training import encoding, examples, students, targets
from training.finetune import finetune
from training.measure import measure
from training.onpolicy import distil
from training.recipe import FinetuneSettings, OnPolicySettings, TrainingFailed
from tutelage.stores.datasets import read_curve

ANSWER_OF = {"red": "yes", "green": "sports", "blue": "no"}
TAUGHT = FinetuneSettings(learning_rate=1e-2, budget_tokens=5000, probe_tokens=0, max_epochs=10)
HASTY = TAUGHT.model_copy(update={"budget_tokens": 700, "least_examples": 0, "learning_rate": 3e-3})
STEPS = 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"Which category is {colour} number {i}?", "label": ANSWER_OF[colour]} for i in range(40) for colour in ANSWER_OF]
    random.Random(0).shuffle(rows)
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def trained(tiny: Path, data: Path, out: Path, config: FinetuneSettings) -> Path:
    finetune(data, out, validation=None, base_dir=tiny, config=config, curve=out / "curve.csv", say=lambda line: None)
    return out


def loss_of(tiny: Path, data: Path, adapter: Path) -> float:
    loaded = students.with_saved_adapter(students.load(tiny, TAUGHT, base.detect_precision()), adapter)
    return measure(loaded, encoding.encode_answers(examples.read(data), loaded.tokenizer, TAUGHT), pass_tokens=512).loss


def test_a_student_learns_from_its_own_answers_what_its_teacher_would_have_said(tiny: Path, data: Path, tmp_path: Path) -> None:
    teacher = trained(tiny, data, tmp_path / "teacher", TAUGHT)
    student = trained(tiny, data, tmp_path / "student", HASTY)
    config = OnPolicySettings(steps=STEPS, learning_rate=3e-3, most_tokens=4)
    written = distil(data, student, tmp_path / "out", base_dir=tiny, teacher=(tiny, teacher), config=config, say=lambda line: None)
    assert loss_of(tiny, data, tmp_path / "out") < loss_of(tiny, data, student) / 2
    adapters.verify(tmp_path / "out", digest=written["adapter_digest"], base_fingerprint=base.fingerprint(tiny))
    assert written["parent_adapter"] == adapters.digest(student) != written["adapter_digest"]
    assert written["teacher_adapter"] == adapters.digest(teacher)
    assert written == json.loads((tmp_path / "out" / "manifest.json").read_text())
    curve = read_curve(tmp_path / "out" / "curve.csv")
    assert [row["step"] for row in curve] == [*range(1, STEPS + 1)]
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_a_teacher_with_another_tokenizer_and_an_absent_extra_are_refused(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = trained(tiny, data, tmp_path / "student", HASTY)
    given = {"base_dir": tiny, "teacher": (tiny, None), "config": OnPolicySettings()}
    with monkeypatch.context() as patched:
        hashes = iter(["one", "another"])
        patched.setattr(targets, "tokenizer_hash", lambda tokenizer: next(hashes))
        with pytest.raises(TrainingFailed, match="another tokenizer"):
            distil(data, student, tmp_path / "out", **given)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainingFailed, match=r"tutelage\[on-policy\]"):
        distil(data, student, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
