"""Verifiers: what counts as right, by kind of task."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import FakeJudge
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import ConfigInvalid, EngineFailed
from tutelage.settings import JudgedBySettings
from tutelage.verifiers import KINDS, VerifierSettings, verifier
from tutelage.verifiers.code import Limits, run_tests
from tutelage.verifiers.judge import ModelJudge, judged

SORTED = "def sort(values):\n    return sorted(values)"
TESTS = "assert sort([3, 1, 2]) == [1, 2, 3]"


def right(kind: str, answer: str, label: str, **row: Any) -> bool:
    return verifier(VerifierSettings.model_validate({"kind": kind}))(answer, label, row).right


@pytest.mark.parametrize(
    ("kind", "answer", "label", "expected"),
    [
        ("exact", "Paris", "Paris", True),
        ("exact", "paris", "Paris", False),
        ("normalised", " paris. ", "Paris", True),
        ("normalised", "Paris, France", "Paris", False),
        ("numeric", "So the total is 1,234.50", "1234.5", True),
        ("numeric", "It is 12 % of 50: 6", "6", True),
        ("numeric", "50%", "50", False),
        ("numeric", "none", "3", False),
        ("numeric", "−3", "-3", True),
        ("json_schema", '{"b": 1, "a": [2]}', '{"a": [2], "b": 1}', True),
        ("json_schema", '```json\n{"a": 1}\n```', '{"a": 1}', True),
        ("json_schema", "{a: 1}", '{"a": 1}', False),
        ("reasoning_gym", "5", "5.0", True),
    ],
)
def test_an_answer_is_right_by_its_kind(kind: str, answer: str, label: str, expected: bool) -> None:
    assert right(kind, answer, label) is expected


def test_json_is_held_to_its_schema() -> None:
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    assert right("json_schema", '{"name": "Ada"}', "any person", schema=schema)
    assert not right("json_schema", '{"name": 3}', "any person", schema=schema)


def test_a_reasoning_gym_row_is_scored_by_its_task() -> None:
    import sys
    import types

    sys.modules.setdefault("pycosat", types.ModuleType("pycosat"))
    import reasoning_gym

    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)[0]
    assert right("reasoning_gym", entry["answer"], "nonsense", task="chain_sum", entry=entry)
    assert not right("reasoning_gym", "nonsense", "nonsense", task="chain_sum", entry=entry)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_every_number_equals_itself_written_in_a_sentence(number: float) -> None:
    assert right("numeric", f"The answer is {number!r}", repr(number))


@given(st.text(min_size=1), st.sampled_from([k for k in KINDS if k != "code"]))
def test_no_answer_breaks_a_verifier(text: str, kind: str) -> None:
    assert 0 <= verifier(VerifierSettings.model_validate({"kind": kind}))(text, "label", {}).score <= 1


@pytest.mark.parametrize("answer", [SORTED, f"Here it is:\n```python\n{SORTED}\n```\nDone."])
def test_code_that_passes_its_tests_is_right(answer: str) -> None:
    verdict = run_tests(answer, TESTS, Limits())
    assert verdict.right, verdict.reason


@pytest.mark.parametrize(
    "answer",
    [
        "def sort(values):\n    return values",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "while True: pass",
        "values = bytearray(2 << 30)\n" + SORTED,
        "import socket\nsocket.socket()\n" + SORTED,
        "import subprocess\nsubprocess.run(['true'])\n" + SORTED,
        "import os\nos.fork()\n" + SORTED,
        "not python at all",
    ],
)
def test_code_that_fails_leaves_or_reaches_out_is_wrong(answer: str) -> None:
    assert not run_tests(answer, TESTS, Limits(seconds=1, megabytes=256)).right


def test_code_sees_neither_our_environment_nor_our_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a secret")
    assert run_tests("import os", "assert 'OPENAI_API_KEY' not in os.environ and os.listdir() == []", Limits()).right


def judge_at(server: FakeJudge, **more: Any) -> ModelJudge:
    named = {"model": "large", "family": "mistral", "teacher_families": ("openai",)}
    return ModelJudge(JudgedBySettings(**named, base_url=f"{server.url}/v1", **more))


@pytest.mark.parametrize(
    ("prefers", "right"),
    [
        (lambda first, second: "FIRST" if first == "other words" else "SECOND", True),
        (lambda first, second: "FIRST" if first == "the label" else "SECOND", False),
        (lambda first, second: "TIE", True),
        (lambda first, second: "FIRST", False),
        (lambda first, second: "I cannot say", False),
    ],
)
def test_what_no_program_finds_right_is_right_when_the_judge_holds_to_it_both_ways_round(prefers: Any, right: bool) -> None:
    with FakeJudge(prefers) as server:
        verify = judged(verifier(VerifierSettings()), judge_at(server))
        assert verify("other words", "the label", {"prompt": "Which?"}).right is right
        assert len(server.requests) == 2


def test_a_judge_is_not_asked_of_what_a_program_finds_right_nor_of_nothing() -> None:
    with FakeJudge() as server:
        verify = judged(verifier(VerifierSettings()), judge_at(server))
        assert verify("42", "42", {"prompt": "Which?"}).right
        assert not verify(" ", "42", {"prompt": "Which?"}).right
        assert server.requests == []


def test_a_judge_that_does_not_answer_or_whose_key_is_not_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with FakeJudge() as server:
        server.status = 500
        with pytest.raises(EngineFailed, match="did not answer"):
            judge_at(server).compare("Which?", "a", "b")
        with pytest.raises(ConfigInvalid, match="JUDGE_KEY"):
            judge_at(server, api_key_env="JUDGE_KEY")


def test_a_verdict_says_what_was_compared() -> None:
    verdict = verifier(VerifierSettings(kind="numeric"))("41", "42", {})
    assert (verdict.right, verdict.reason) == (False, "41 against 42")
