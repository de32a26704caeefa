"""The Python API of distillation, on a tiny base: the documented example, run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import build_tiny_base

from tutelage.distillation import DistillationConfig, KnowledgeDistillation, StageFailed
from tutelage.errors import InvalidRequest

pytestmark = pytest.mark.slow
SIGNS = {"red": "yes", "green": "sports", "blue": "no"}
STAGES = {"finetune": {"learning_rate": 0.01, "budget_tokens": 4000, "probe_tokens": 1500}, "evaluate": {"in_context_items": 4}}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return build_tiny_base(tmp_path / "base")


def test_recorded_answers_become_a_student_that_beats_the_majority(tiny: Path, encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "home" / "models" / "encoder").symlink_to(encoder)
    rows = [{"prompt": f"Which category is {sign} number {i}?", "label": answer} for i in range(40) for sign, answer in SIGNS.items()]
    config = DistillationConfig(distillation_strategy="response", batch_size=2, num_epochs=4, stages=STAGES)
    distillation = KnowledgeDistillation(config, interactions=rows, home=tmp_path / "home")
    student = distillation.distill_knowledge(tiny, "acme-signs")
    assert student.accuracy > student.majority
    assert student.to_dict()["reports"]["curated"]["splits"]["train"] > 20
    told = distillation.export_training_data(tmp_path / "train.jsonl", format="openai")
    assert "rows as openai" in told["told"]
    assert set(json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])) == {"messages"}


def test_a_stage_that_refuses_its_input_says_why(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}", "label": "yes", "metadata": {"embedding": "AAA8AAA8"}} for i in range(5)]
    distillation = KnowledgeDistillation(interactions=rows, home=tmp_path / "home")
    with pytest.raises(StageFailed, match="record more traffic"):
        distillation.distill_knowledge(tiny, "too-little")


@pytest.mark.parametrize("name", ["a/b", "", "../up"])
def test_a_student_has_a_plain_name(tiny: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="student_id"):
        KnowledgeDistillation(interactions=[{"prompt": "x", "label": "y"}], home=tmp_path).distill_knowledge(tiny, name)


def test_without_interactions_there_is_nothing_to_distil(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no interactions"):
        KnowledgeDistillation(home=tmp_path).distill_knowledge(tiny, "empty")
