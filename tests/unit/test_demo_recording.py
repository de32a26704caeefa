"""The recorded teacher is right but for a known share of prompts, the same ones however often and in whatever order they are asked."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tutelage.demo.recording import answers, write
from tutelage.demo.traffic import Item
from tutelage.scoring import matches

ITEMS = [Item(f"What comes after {n}?", str(n + 1), "count") for n in range(2000)]


def test_without_errors_every_answer_is_the_label() -> None:
    assert answers(ITEMS, error_rate=0.0, seed=1) == [item.label for item in ITEMS]


def test_the_share_of_wrong_answers_is_about_what_was_asked_for() -> None:
    wrong = sum(not matches(said, item.label) for said, item in zip(answers(ITEMS, error_rate=0.05, seed=1), ITEMS, strict=True))
    assert 60 < wrong < 140


def test_a_wrong_answer_is_another_prompts_of_the_same_task() -> None:
    mixed = [*ITEMS[:500], *(Item(f"Which colour is {n}?", "red" if n % 2 else "blue", "colour") for n in range(500))]
    said = answers(mixed, error_rate=0.5, seed=1)
    assert {answer for answer, item in zip(said, mixed, strict=True) if item.task == "colour"} == {"red", "blue"}


def test_a_repeat_is_answered_as_the_first_time_whatever_the_order() -> None:
    shuffled = random.Random(0).sample(ITEMS + ITEMS[:100], len(ITEMS) + 100)
    first = dict(zip((item.prompt for item in ITEMS), answers(ITEMS, error_rate=0.2, seed=4), strict=True))
    assert answers(shuffled, error_rate=0.2, seed=4) == [first[item.prompt] for item in shuffled]


@pytest.mark.parametrize("error_rate", [0.5, 1.0])
def test_where_there_is_but_one_label_the_answer_is_right(error_rate: float) -> None:
    assert answers([Item("Is it?", "yes", "t"), Item("Really?", "yes", "t")], error_rate=error_rate, seed=1) == ["yes", "yes"]


def test_the_file_holds_each_item_as_the_gateway_will_be_asked(tmp_path: Path) -> None:
    item = Item("And then?", "2", "t", context=(("user", "One?"), ("assistant", "1")))
    write([item], tmp_path / "r.jsonl")
    assert json.loads((tmp_path / "r.jsonl").read_text()) == {"messages": item.messages(), "answer": "2"}
