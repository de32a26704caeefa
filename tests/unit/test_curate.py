"""Curation: what is kept, where it goes and what the report says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import examples
from training.curate import CurateSettings, curate, split_of
from tutelage.errors import TrafficUnreadable

SMALL = CurateSettings(min_train=1, min_test=1)


def row(prompt: str, answer: str = "5", **metadata: Any) -> str:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, "metadata": metadata})


def traffic(count: int) -> list[str]:
    return [row(f"What is {i} plus {i}?", str(2 * i), request_id=f"r{i}") for i in range(count)]


def run(tmp_path: Path, lines: list[str], config: CurateSettings = SMALL) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    data, out = tmp_path / "interactions.jsonl", tmp_path / "curated"
    data.write_text("\n".join(lines))
    report = curate(data, out, config=config)
    splits = {name: [json.loads(x) for x in (out / f"{name}.jsonl").read_text().split("\n") if x] for name in report["splits"]}
    return report, splits


def prompts_of(rows: list[dict[str, Any]]) -> set[str]:
    return {r["messages"][0]["content"] for r in rows}


def test_every_row_lands_in_exactly_one_split(tmp_path: Path) -> None:
    report, splits = run(tmp_path, traffic(400))
    every = [p for rows in splits.values() for p in prompts_of(rows)]
    assert len(every) == len(set(every)) == 400 == report["rows"]
    assert all(splits.values())


def test_a_held_out_prompt_stays_held_out_when_traffic_grows(tmp_path: Path) -> None:
    roomy = CurateSettings(max_validation=1000, max_calibration=1000, max_test=1000)
    _, before = run(tmp_path, traffic(200), roomy)
    _, after = run(tmp_path, traffic(600), roomy)
    for name, rows in before.items():
        assert prompts_of(rows) <= prompts_of(after[name])


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    lines = [*traffic(100), row("What is 3 plus 3?", "seven", request_id="late")]
    forward, _ = run(tmp_path, lines)
    random.Random(1).shuffle(lines)
    shuffled, _ = run(tmp_path, lines)
    assert forward["digest"] == shuffled["digest"]


def test_prompts_that_differ_in_case_or_spacing_are_one_prompt(tmp_path: Path) -> None:
    report, _ = run(tmp_path, [*traffic(100), row("  what IS 7 plus 7? ", "14")])
    assert report["left_out"] == {"duplicate": 1}


def test_of_duplicates_the_right_answer_is_kept(tmp_path: Path) -> None:
    lines = traffic(100)
    wrong = [row(f"What is {i} plus {i}?", "wrong", verdict=0.0, label=str(2 * i)) for i in range(100)]
    _, splits = run(tmp_path, wrong + lines)
    assert all(r["messages"][-1]["content"] != "wrong" for rows in splits.values() for r in rows)


def test_wrong_teacher_answers_are_not_learned_but_still_judge_with_the_right_label(tmp_path: Path) -> None:
    lines = [row(f"What is {i}?", "wrong" if i % 2 else "right", label="right") for i in range(200)]
    report, splits = run(tmp_path, lines)
    assert {r["messages"][-1]["content"] for r in splits["train"]} == {"right"}
    assert {r["messages"][-1]["content"] for r in splits["test"]} == {"right", "wrong"}
    assert {r["label"] for r in splits["test"]} == {"right"}
    assert report["left_out"]["teacher_wrong_train"] > 0


def test_a_wrong_answer_without_a_label_is_used_for_nothing(tmp_path: Path) -> None:
    report, _ = run(tmp_path, [*traffic(100), *(row(f"Bad {i}", "x", verdict=0.0) for i in range(20))])
    assert report["left_out"]["no_reference"] == 20
    assert sum(report["splits"].values()) == 100


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"prompt": "", "label": "x"}',
        '{"messages": [{"role": "user", "content": "x"}]}',
        '{"prompt": "\\ud800", "label": "x"}',
    ],
)
def test_an_unreadable_line_is_reported_with_its_number_and_what_is_expected(tmp_path: Path, line: str) -> None:
    report, _ = run(tmp_path, [*traffic(100), "", line])
    [fault] = report["unreadable"]
    assert fault["line"] == 102
    assert '"prompt"' in fault["problem"]


@pytest.mark.parametrize("text", ["<|im_end|>\n<|im_start|>system", "my key is sk-abcdefghijklmnopqrstuvwx", "AKIAABCDEFGHIJKLMNOP"])
def test_rows_with_control_tokens_or_secrets_are_left_out(tmp_path: Path, text: str) -> None:
    report, splits = run(tmp_path, [*traffic(100), row(f"Please read {text}")])
    assert sum(report["left_out"].values()) == 1
    assert not any(text in json.dumps(rows) for rows in splits.values())


def test_caps_bound_every_split(tmp_path: Path) -> None:
    config = CurateSettings(max_train=10, max_validation=2, max_calibration=3, max_test=4, min_train=1, min_test=1)
    report, _ = run(tmp_path, traffic(400), config)
    assert report["splits"] == {"train": 10, "validation": 2, "calibration": 3, "test": 4}


def test_too_little_traffic_is_refused_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(TrafficUnreadable, match="at least 20 are needed"):
        run(tmp_path, traffic(10), CurateSettings())


def test_plain_labelled_rows_need_no_metadata(tmp_path: Path) -> None:
    _, splits = run(tmp_path, [json.dumps({"id": str(i), "prompt": f"headline {i}", "label": "up"}) for i in range(100)])
    assert splits["train"][0]["messages"][-1] == {"role": "assistant", "content": "up"}


def test_a_line_separator_inside_a_prompt_ends_no_row(tmp_path: Path) -> None:
    text = json.dumps({"prompt": "one\u2028two", "label": "x"}, ensure_ascii=False)
    report, _ = run(tmp_path, [*traffic(100), text])
    assert report["unreadable"] == []


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_a_row_survives_being_written_and_read(prompt: str, label: str) -> None:
    example = examples.parse(json.dumps({"prompt": prompt, "label": label}))
    assert examples.parse(json.dumps(example.row())) == example


def test_splits_have_the_shares_they_claim() -> None:
    keys = [examples.prompt_key(({"role": "user", "content": str(i)},)) for i in range(4000)]
    share = {name: sum(split_of(k) == name for k in keys) / 4000 for name in ("train", "validation", "calibration", "test")}
    assert share["train"] == pytest.approx(0.70, abs=0.03)
    assert share["test"] == pytest.approx(0.13, abs=0.03)
