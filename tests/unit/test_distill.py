"""Distil: what a strategy adds to a row, where it comes from, and that nothing is made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTeacher, build_tiny_base

from inference import base, prompts
from training.distill import DistillSettings, distill, weigh
from training.examples import parse
from training.teachers import TeacherSettings, Vocabulary
from tutelage.errors import ConfigInvalid, EngineFailed

QUESTIONS = {"Is it red?": "yes", "Is it green?": "no", "Is it blue?": "red, green or blue"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def vocabulary(tiny: Path) -> Vocabulary:
    tokenizer = base.load_tokenizer(tiny)
    return Vocabulary.of(tokenizer, prompts.template_hash(tokenizer))


def write(tmp_path: Path, **metadata: Any) -> Path:
    file = tmp_path / "train.jsonl"
    rows = [{"prompt": question, "label": answer, "metadata": metadata} for question, answer in QUESTIONS.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(data: Path, tiny: Path | None = None, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out = data.parent / "distilled"
    report = distill(data, out, config=DistillSettings.model_validate(settings), base_dir=tiny)
    return report, [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def spoken(vocabulary: Vocabulary) -> Any:
    """Log-probabilities of an answer as OpenAI tells them, by a teacher with the student's tokens: 0.7, and 0.2 for another token."""

    def content(answer: str) -> list[dict[str, Any]]:
        ids = vocabulary.encode(answer)
        told = [vocabulary.tokenizer.decode([at]) for at in ids]
        other = vocabulary.tokenizer.decode([vocabulary.encode("maybe")[0]])
        top = [{"token": token, "logprob": math.log(0.7)} for token in told]
        return [{**t, "top_logprobs": [t, {"token": other, "logprob": math.log(0.2)}]} for t in top]

    return content


def test_response_passes_the_words_on_and_adds_nothing(tmp_path: Path) -> None:
    report, rows = run(write(tmp_path, rationale="why"), strategy="response")
    assert report["carried"] == {}
    assert [set(row) for row in rows] == [{"messages", "label", "metadata"}] * 3


def test_log_probabilities_of_an_endpoint_fit_the_tokens_of_the_answer(tmp_path: Path, tiny: Path, vocabulary: Vocabulary) -> None:
    with FakeTeacher(QUESTIONS, logprobs=spoken(vocabulary)) as server:
        teacher = {"source": "endpoint", "base_url": f"{server.url}/v1", "model": "t", "tokenizer": str(tiny)}
        report, rows = run(write(tmp_path), tiny, strategy="soft-targets", teacher=teacher)
    assert report["carried"] == {"targets": 3}
    for row in rows:
        targets, ids = row["targets"], vocabulary.encode(row["label"])
        assert [top[0] for top in targets["top_ids"]] == ids
        for logprobs, tail in zip(targets["top_logprobs"], targets["tail_logprob"], strict=True):
            assert sum(map(math.exp, logprobs)) + math.exp(tail) == pytest.approx(1)
    manifest = json.loads((tmp_path / "distilled" / "train.jsonl.manifest.json").read_text())
    assert manifest["tokenizer_hash"] == vocabulary.hash
    assert manifest["template_hash"] == vocabulary.template_hash


def test_a_teacher_that_now_says_something_else_gives_no_targets(tmp_path: Path, tiny: Path, vocabulary: Vocabulary) -> None:
    with FakeTeacher({**QUESTIONS, "Is it red?": "no"}, logprobs=spoken(vocabulary)) as server:
        teacher = {"source": "endpoint", "base_url": f"{server.url}/v1", "model": "t", "tokenizer": str(tiny)}
        report, rows = run(write(tmp_path), tiny, strategy="soft-targets", teacher=teacher)
    assert report["text_only"] == {"other_answer_or_tokens": 1}
    assert ["targets" in row for row in rows] == [False, True, True]


@pytest.mark.parametrize(("named", "why"), [(False, "teacher_tokenizer_not_named"), (True, "other_tokenizer")])
def test_log_probabilities_of_other_tokens_are_not_used(tmp_path: Path, tiny: Path, vocabulary: Vocabulary, named: bool, why: str) -> None:
    other = tmp_path / "other"
    if named:
        tokenizer = base.load_tokenizer(tiny)
        tokenizer.add_tokens(["quite another token"])
        tokenizer.save_pretrained(str(other))
        (other / "config.json").write_text((tiny / "config.json").read_text())
    with FakeTeacher(QUESTIONS, logprobs=spoken(vocabulary)) as server:
        teacher = {"source": "endpoint", "base_url": f"{server.url}/v1", "model": "t", "tokenizer": str(other) if named else None}
        report, rows = run(write(tmp_path), tiny, strategy="multi-aspect", teacher=teacher)
    assert report["text_only"] == {why: 3}
    assert all("targets" not in row and "rationale" in row for row in rows)


def test_an_endpoint_without_log_probabilities_leaves_text(tmp_path: Path, tiny: Path) -> None:
    with FakeTeacher(QUESTIONS) as server:
        teacher = {"source": "endpoint", "base_url": f"{server.url}/v1", "model": "t", "tokenizer": str(tiny)}
        with pytest.raises(ConfigInvalid, match="3 no_logprobs"):
            run(write(tmp_path), tiny, strategy="soft-targets", teacher=teacher)


def test_stored_targets_are_taken_by_prompt_and_only_of_this_tokenizer(tmp_path: Path, tiny: Path, vocabulary: Vocabulary) -> None:
    stored = tmp_path / "stored.jsonl"
    ids = vocabulary.encode("yes")
    targets = {"top_ids": [[at] for at in ids], "top_logprobs": [[-0.1]] * len(ids), "tail_logprob": [-3.0] * len(ids)}
    stored.write_text(json.dumps({"prompt": "is it RED?", "targets": targets}) + "\n")
    manifest = stored.with_name("stored.jsonl.manifest.json")
    manifest.write_text(json.dumps({"tokenizer_hash": vocabulary.hash, "template_hash": vocabulary.template_hash}))
    teacher = {"source": "file", "file": str(stored)}
    report, rows = run(write(tmp_path), tiny, strategy="soft-targets", teacher=teacher)
    assert rows[0]["targets"] == targets
    assert report["text_only"] == {"not_in_file": 2}
    manifest.write_text(json.dumps({"tokenizer_hash": "another", "template_hash": vocabulary.template_hash}))
    with pytest.raises(ConfigInvalid, match="token ids would mean other tokens"):
        run(write(tmp_path), tiny, strategy="soft-targets", teacher=teacher)


def test_reasons_are_kept_where_they_led_to_the_answer(tmp_path: Path) -> None:
    with FakeTeacher({**QUESTIONS, "Is it red?": "no"}, reasons="It looks so.") as server:
        teacher = {"source": "endpoint", "base_url": f"{server.url}/v1", "model": "t"}
        report, rows = run(write(tmp_path), strategy="reasoning", teacher=teacher)
    assert report["without_rationale"] == {"rationale_of_another_answer": 1}
    assert [row.get("rationale") for row in rows] == [None, "It looks so.", "It looks so."]


def test_a_second_run_asks_nothing_twice(tmp_path: Path) -> None:
    with FakeTeacher(QUESTIONS) as server:
        teacher = {"source": "endpoint", "base_url": f"{server.url}/v1", "model": "t"}
        first = run(write(tmp_path), strategy="reasoning", teacher=teacher)
        assert run(write(tmp_path), strategy="reasoning", teacher=teacher) == first
        assert len(server.requests) == 3


def test_a_teacher_that_is_down_is_an_error_and_no_empty_data(tmp_path: Path) -> None:
    with FakeTeacher(QUESTIONS) as server:
        server.status = 500
        teacher = {"source": "endpoint", "base_url": f"{server.url}/v1", "model": "t"}
        with pytest.raises(EngineFailed, match="none of 3"):
            run(write(tmp_path), strategy="reasoning", teacher=teacher)


def test_rows_weigh_by_their_scores_and_one_on_average() -> None:
    scores: list[dict[str, float]] = [{"feedback": 1.0, "judge": 1.0}, {"feedback": 0.0, "judge": 0.0}, {}]
    rows = [parse(json.dumps({"prompt": f"q{i}", "label": "a", "metadata": {"scores": s}})) for i, s in enumerate(scores)]
    config = DistillSettings(dimensions={"feedback": 1.0, "judge": 1.0})
    good, bad, unknown = weigh(rows, config)
    assert good > unknown > bad > 0
    assert (good + bad + unknown) / 3 == pytest.approx(1, abs=1e-5)
    assert weigh(rows, DistillSettings(dimensions={"feedback": 0.0})) == [1.0, 1.0, 1.0]


def test_the_hardest_wrong_answer_stands_beside_the_right_one(tmp_path: Path) -> None:
    attempts = [
        {"answer": "yes", "confidence": 0.99},
        {"answer": "perhaps", "confidence": 0.2},
        {"answer": "surely not", "confidence": 0.9},
    ]
    report, rows = run(write(tmp_path, attempts=attempts, wrong_answers=["nothing"]), strategy="metric-aware", max_preferences=2)
    assert report["carried"] == {"rejected": 2, "weight": 3}
    by_label = {row["label"]: row for row in rows}
    # "yes" is right for one prompt and the surest wrong answer to the others, which are the hardest
    assert "rejected" not in by_label["yes"]
    assert by_label["no"]["rejected"] == by_label["red, green or blue"]["rejected"] == "yes"
    assert by_label["no"]["chosen"] == "no"


def test_an_endpoint_must_be_named() -> None:
    with pytest.raises(ValueError, match="base_url"):
        TeacherSettings(source="endpoint")
