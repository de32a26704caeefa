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


def run(
    tmp_path: Path, lines: list[str], config: CurateSettings = SMALL, *, frozen: list[str] | None = None
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    data, out = tmp_path / "interactions.jsonl", tmp_path / "curated"
    data.write_text("\n".join(lines))
    held = tmp_path / "frozen.jsonl"
    held.write_text("\n".join(frozen or []))
    report = curate(data, out, config=config, frozen=[held])
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


def answers_of(rows: list[dict[str, Any]]) -> list[str]:
    return [r["messages"][-1]["content"] for r in rows]


def tickets(count: int) -> list[tuple[str, str]]:
    """Support tickets of three kinds, each kind with words of its own."""
    rng = random.Random(5)
    kinds = {
        "billing": ["invoice", "charge", "refund", "payment", "card", "price", "bill", "euro", "discount", "receipt"],
        "access": ["password", "login", "account", "locked", "reset", "code", "email", "user", "sign", "session"],
        "shipping": ["parcel", "delivery", "courier", "late", "address", "track", "box", "depot", "customs", "return"],
    }
    names = sorted(kinds)
    return [(f"{' '.join(rng.sample(kinds[names[i % 3]], 4))} ticket {i}", names[i % 3]) for i in range(count)]


@pytest.mark.parametrize("rewrite", ["please tell me: {0}", "{0} thanks", "Hello! {0}"])
def test_what_asks_the_same_as_a_held_out_prompt_is_not_trained_on(tmp_path: Path, rewrite: str) -> None:
    rng = random.Random(2)
    words = [f"{a}{b}" for a in ("ba", "do", "ki", "lu", "me", "ro", "su", "ti") for b in ("ban", "der", "fin", "gol", "mas", "nep", "rig")]
    prompts = [" ".join(rng.sample(words, 25)) for _ in range(200)]
    lines = [row(p, "refund", request_id=f"a{i}") for i, p in enumerate(prompts)]
    lines += [row(rewrite.format(p), "refund", request_id=f"b{i}") for i, p in enumerate(prompts)]
    roomy = CurateSettings(min_train=1, min_test=1, max_validation=1000, max_calibration=1000, max_test=1000, duplicate_words=1.0)
    report, splits = run(tmp_path, lines, roomy)
    held = {p for name, rows in splits.items() if name != "train" for p in prompts_of(rows)}
    twins = {p: rewrite.format(p) for p in prompts} | {rewrite.format(p): p for p in prompts}
    assert not {twins[p] for p in held} & prompts_of(splits["train"])
    assert report["left_out"]["like_held_out_train"] > 20


def test_templates_that_ask_different_things_are_not_one_cluster(tmp_path: Path) -> None:
    lines = [row(f"State the final answer to the following problem: {i} + {j} =", str(i + j)) for i in range(20) for j in range(10)]
    report, _ = run(tmp_path, lines)
    assert report["left_out"].get("like_held_out_train", 0) < 0.05 * len(lines)


def test_nothing_that_another_set_holds_out_is_trained_on(tmp_path: Path) -> None:
    lines = traffic(300)
    _, before = run(tmp_path, lines)
    secret = [json.dumps(r) for r in before["train"][:20]]
    report, after = run(tmp_path, lines, frozen=secret)
    assert not prompts_of(before["train"][:20]) & prompts_of(after["train"])
    assert report["left_out"]["frozen"] == 20
    assert report["steps"]["decontaminate"]["frozen"] == 20


def test_personal_data_leave_prompts_and_rows_with_personal_answers_leave(tmp_path: Path) -> None:
    mail = [row(f"Write to person{i}@example.com about case {i}", f"done {i}") for i in range(30)]
    report, splits = run(tmp_path, [*traffic(100), *mail, row("Who asked?", "ada@example.com")])
    text = json.dumps(splits)
    assert "@example.com" not in text
    assert "[email]" in text
    assert report["steps"]["scrub"]["redacted"] == 30
    assert report["left_out"]["personal_answer"] == 1


def test_tenants_that_opted_out_are_nowhere(tmp_path: Path) -> None:
    lines = [row(f"Question {i} of them", "yes", tenant="out" if i % 2 else "in") for i in range(200)]
    report, splits = run(tmp_path, lines, SMALL.model_copy(update={"opted_out": ("out",)}))
    assert report["left_out"]["opted_out"] == 100
    assert "out" not in {r["metadata"]["tenant"] for rows in splits.values() for r in rows}


def test_every_step_accounts_for_its_rows(tmp_path: Path) -> None:
    report, _ = run(tmp_path, [*traffic(200), *traffic(5), row("key AKIAABCDEFGHIJKLMNOP")])
    for step in report["steps"].values():
        assert step["in"] - step["out"] == sum(step["left_out"].values())


def test_no_tenant_is_more_than_its_share(tmp_path: Path) -> None:
    lines = [row(f"Question {i}", "yes", tenant="large" if i % 10 else "small") for i in range(400)]
    report, _ = run(tmp_path, lines, SMALL.model_copy(update={"max_tenant_share": 0.6}))
    tenants = report["shares"]["tenant"]
    assert tenants["large"] <= 0.6 * sum(tenants.values())
    assert report["left_out"]["over_tenant_share"] > 0


def test_answers_of_students_are_few_and_never_of_the_second_generation(tmp_path: Path) -> None:
    lines = [row(f"Question {i}", "yes", provenance="student" if i % 2 else "teacher", depth=1 + i % 3 // 2) for i in range(400)]
    report, splits = run(tmp_path, lines)
    sources = report["shares"]["provenance"]
    assert sources["student"] <= 0.2 * sum(sources.values())
    assert all(r["metadata"]["depth"] <= 1 for r in splits["train"])


def test_nobody_is_judged_by_what_a_student_said(tmp_path: Path) -> None:
    lines = [row(f"Question {i}", "yes", provenance="student" if i % 2 else "teacher") for i in range(400)]
    report, splits = run(tmp_path, lines)
    assert {r["metadata"]["provenance"] for name in ("test", "calibration") for r in splits[name]} == {"teacher"}
    assert report["left_out"]["answered_by_student"] > 0


def test_what_the_teacher_was_unsure_of_can_be_left_out(tmp_path: Path) -> None:
    lines = [row(f"Question {i}", "yes", provenance="teacher", confidence=i / 200) for i in range(200)]
    _, splits = run(tmp_path, lines, SMALL.model_copy(update={"min_teacher_confidence": 0.85}))
    assert all(r["metadata"]["confidence"] > 0.85 for r in splits["train"])
    assert any(r["metadata"]["confidence"] < 0.85 for r in splits["calibration"])


def test_the_newest_rows_can_be_kept_for_judging(tmp_path: Path) -> None:
    lines = [row(f"Question {i}", "yes", created_at=f"2026-11-{1 + i // 20:02d}T00:00:00+00:00") for i in range(400)]
    report, splits = run(tmp_path, lines, SMALL.model_copy(update={"later_share": 0.25}))
    cut = report["steps"]["time"]["cut"]
    assert all(r["metadata"]["created_at"] < cut for r in splits["train"])
    assert {r["metadata"].get("later", False) for r in splits["test"]} == {True, False}


def test_a_wrong_answer_beside_the_right_one_is_kept_as_such(tmp_path: Path) -> None:
    lines = traffic(60) + [row(f"What is {i} plus {i}?", "wrong", label=str(2 * i)) for i in range(60)]
    _, splits = run(tmp_path, lines)
    assert splits["train"]
    assert all(r["metadata"]["wrong_answers"] == ["wrong"] for r in splits["train"])


@pytest.mark.parametrize("attempts", [[], [{"model": "s", "answer": "billing", "confidence": 0.4}]])
def test_wrong_labels_in_a_tenants_feedback_hardly_reach_training(tmp_path: Path, attempts: list[dict[str, Any]]) -> None:
    """A tenth of one tenant's feedback is wrong; the bound is two in a hundred rows that are learned from."""
    rng = random.Random(0)
    lines, poisoned = [], set()
    for i, (text, label) in enumerate(tickets(900)):
        mine = i % 2 == 0
        wrong = rng.choice(sorted({"billing", "access", "shipping"} - {label}))
        if mine and rng.random() < 0.1:
            poisoned.add(f"r{i}")
            label = wrong
        tried = attempts if mine else []
        lines.append(row(text, label, request_id=f"r{i}", tenant="t", provenance="user" if mine else "teacher", attempts=tried))
    report, splits = run(tmp_path, lines, SMALL.model_copy(update={"duplicate_words": 1.0}))
    learned = {r["metadata"]["request_id"] for r in splits["train"]}
    doubted = {doubt["request_id"] for doubt in report["doubted"]}
    assert len(poisoned & learned) <= 0.02 * len(learned)
    assert len(doubted & poisoned) > 10
    assert len(doubted - poisoned) <= 0.05 * len(learned)


def test_labels_that_nothing_speaks_for_are_few(tmp_path: Path) -> None:
    """Answers that never repeat have no like to ask: users' own are bounded, and with a tenth of them wrong that is two in a hundred."""
    lines = [row(f"What is {i} plus {i}?", str(2 * i), provenance="user" if i % 2 else "teacher") for i in range(400)]
    report, splits = run(tmp_path, lines)
    assert report["shares"]["provenance"]["user"] <= 0.2 * len(splits["train"])
    assert report["left_out"]["label_unchecked"] > 0


def test_a_label_that_a_model_said_too_needs_no_other_word(tmp_path: Path) -> None:
    said = [{"model": "s", "answer": "no", "confidence": 0.5}]
    lines = [row(f"What is {i} plus {i}?", "no", provenance="user", attempts=said) for i in range(200)]
    report, _ = run(tmp_path, lines)
    assert report["steps"]["labels"]["untrusted"] == 0
    assert report["shares"]["provenance"] == {"user": report["splits"]["train"]}


def test_embeddings_that_rows_bring_are_used_and_not_kept(tmp_path: Path) -> None:
    import base64

    import numpy as np

    def vector(seed: int) -> str:
        return base64.b64encode(np.random.default_rng(seed).normal(size=16).astype(np.float16).tobytes()).decode()

    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lamda", "mu"]
    lines = [row(f"{words[i % 12]} {words[i // 12]} one", "yes", embedding=vector(i)) for i in range(144)]
    lines += [row(f"quite other words {words[i % 12]}{words[i // 12]}", "yes", embedding=vector(i)) for i in range(144)]
    report, splits = run(tmp_path, lines, SMALL.model_copy(update={"max_test": 1000, "max_calibration": 1000}))
    assert report["embeddings"] is True
    assert report["steps"]["clusters"]["by"]["embedding"] == 144
    assert "embedding" not in json.dumps(splits)
