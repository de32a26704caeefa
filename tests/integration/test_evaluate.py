"""Evaluation through the serving engine, on a tiny base with an adapter taught to say one thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import build_tiny_base, build_tiny_taught_adapter

from training.evaluate import EvaluateSettings, evaluate
from tutelage.errors import AdapterRejected, TrafficUnreadable
from tutelage.routing.confidence import Calibrator

SETTINGS = EvaluateSettings(batch=8, threads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def yes_sayer(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    build_tiny_taught_adapter(tiny, out, answer="yes")
    return out


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def items(tmp_path: Path) -> Path:
    """Three in four are answered by yes; prompts of several lengths, so that batches are not in the order of the file."""
    rows = [{"prompt": "What is the answer" + " really" * (i % 5) + f"? {i}", "label": "no" if i % 4 == 0 else "Yes."} for i in range(40)]
    return write(tmp_path / "items.jsonl", rows)


def test_the_report_counts_right_answers_against_the_majority(tiny: Path, yes_sayer: Path, items: Path) -> None:
    report = evaluate(yes_sayer, items, base_dir=tiny, config=SETTINGS)
    low, high = report["wilson95"]
    assert (report["n"], report["correct"], report["accuracy"]) == (40, 30, 0.75)
    assert low < 0.75 < high
    assert report["majority"] == 0.75
    assert report["tokens_per_second"] > 0
    assert report["core_seconds"] > 0
    assert report["calibrator"] is None


def test_the_calibrator_is_fitted_on_the_other_items_and_judged_on_these(tiny: Path, yes_sayer: Path, items: Path) -> None:
    report = evaluate(yes_sayer, items, base_dir=tiny, config=SETTINGS, calibration=items)
    assert Calibrator.from_dict(report["calibrator"]).kind == "platt"
    assert report["ece"] < 0.25  # bins of four items: chance alone moves it this much
    assert report["mean_confidence"] == pytest.approx(0.75, abs=0.1)
    assert 0 <= report["confident"]["share"] <= 1


def test_a_student_is_asked_again_where_that_is_wanted_and_two_runs_draw_the_same(
    tiny: Path, yes_sayer: Path, items: Path, tmp_path: Path
) -> None:
    drawn = []
    for name in ("one", "two"):
        out = tmp_path / name
        evaluate(yes_sayer, items, base_dir=tiny, config=SETTINGS.model_copy(update={"again": True}), calibration=items, predictions=out)
        drawn.append([json.loads(line)["agreement"] for line in out.read_text().splitlines()])
    assert drawn[0] == drawn[1]
    assert all(3 * share == pytest.approx(round(3 * share)) and 0 <= share <= 1 for share in drawn[0])


def test_predictions_stand_in_the_order_of_the_items(tiny: Path, yes_sayer: Path, items: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.jsonl"
    evaluate(yes_sayer, items, base_dir=tiny, config=SETTINGS, calibration=items, predictions=out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [json.loads(line)["prompt"] for line in items.read_text().splitlines()]
    assert set(rows[0]) == {"prompt", "label", "answer", "score", "agreement", "probability", "correct", "domain"}
    assert rows[0]["correct"] is False
    assert rows[1]["correct"] is True


def test_canaries_are_answered_too_and_no_canaries_are_none(tiny: Path, yes_sayer: Path, items: Path, tmp_path: Path) -> None:
    told = evaluate(yes_sayer, items, base_dir=tiny, config=SETTINGS, canaries=items)["canaries"]
    assert (told["n"], told["correct"], sum(told["right"].values())) == (40, 30, 30)
    none = evaluate(yes_sayer, items, base_dir=tiny, config=SETTINGS, canaries=tmp_path / "none")["canaries"]
    assert none == {"n": 0, "correct": 0, "right": {}}


def test_the_bare_base_can_be_measured_too(tiny: Path, items: Path) -> None:
    report = evaluate(None, items, base_dir=tiny, config=SETTINGS)
    assert report["n"] == 40
    assert report["correct"] == 0


def test_two_evaluations_agree(tiny: Path, yes_sayer: Path, items: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for out in (one, two):
        evaluate(yes_sayer, items, base_dir=tiny, config=SETTINGS, predictions=out)
    assert one.read_text() == two.read_text()


def test_an_answer_that_was_cut_off_is_never_confident(tiny: Path, items: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    build_tiny_taught_adapter(tiny, out, answer="yes no yes no yes no yes no yes no")
    report = evaluate(out, items, base_dir=tiny, config=SETTINGS.model_copy(update={"extra_tokens": 0}), calibration=items)
    assert report["truncated"] == 40
    assert report["confident"]["n"] == 0


def test_a_reference_is_the_label_where_one_is_given_else_the_teachers_answer(tiny: Path, yes_sayer: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What is the answer?"}]
    rows: list[dict[str, Any]] = [
        {"messages": [*turns, {"role": "assistant", "content": "no"}], "label": "yes"},
        {"messages": [*turns, {"role": "assistant", "content": "yes"}]},
        {"messages": turns, "label": "yes"},
    ]
    report = evaluate(yes_sayer, write(tmp_path / "rows.jsonl", rows), base_dir=tiny, config=SETTINGS)
    assert report["correct"] == 3


def test_an_unreadable_row_is_named_by_its_line(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TrafficUnreadable, match=r"rows\.jsonl line 2: .*expected"):
        evaluate(None, write(tmp_path / "rows.jsonl", [{"prompt": "a", "label": "b"}, {"prompt": "a"}]), base_dir=tiny, config=SETTINGS)


def test_a_folder_without_a_manifest_is_refused(tiny: Path, items: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match=r"manifest\.json"):
        evaluate(tmp_path, items, base_dir=tiny, config=SETTINGS)


def test_a_baseline_of_no_items_is_not_measured(tiny: Path, yes_sayer: Path, items: Path) -> None:
    report = evaluate(yes_sayer, items, base_dir=tiny, config=SETTINGS.model_copy(update={"in_context_items": 0}), train=items)
    assert report["baselines"]["in_context"] is None
    assert report["baselines"]["retrieval"]["n"] == 40
