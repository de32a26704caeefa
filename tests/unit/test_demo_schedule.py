"""A day's requests: kinds come and go as the mix says, repeats are earlier requests, a log stays in its order."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tutelage.demo.schedule import MIX, default_day, mixed, read_day, repeated
from tutelage.demo.traffic import Item
from tutelage.errors import TrafficUnreadable


@pytest.fixture(scope="module")
def quarters() -> tuple[tuple[Item, ...], ...]:
    return default_day(seed=3, per_quarter=200).quarters


def log(folder: Path, *prompts: str) -> Path:
    file = folder / "log.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "label": "x", "domain": "d"}) + "\n" for prompt in prompts))
    return file


def test_tasks_come_and_go_as_the_mix_says(quarters: tuple[tuple[Item, ...], ...]) -> None:
    for items, weights in zip(quarters, MIX, strict=True):
        shares = mixed(items)
        assert shares.keys() == weights.keys()
        assert all(abs(shares[task] - weights[task]) < 0.12 for task in weights)
    assert "number_sequence" not in mixed(quarters[0])
    assert "number_sequence" not in mixed(quarters[3])


def test_about_as_many_requests_repeat_an_earlier_one_as_were_asked_for(quarters: tuple[tuple[Item, ...], ...]) -> None:
    assert all(0.2 < count / 200 < 0.4 for count in repeated(quarters))
    assert repeated(default_day(seed=3, per_quarter=50, repeats=0.0).quarters) == [0, 0, 0, 0]


def test_a_repeat_is_word_for_word_the_earlier_request(quarters: tuple[tuple[Item, ...], ...]) -> None:
    labels: dict[object, str] = {}
    for item in (item for quarter in quarters for item in quarter):
        assert labels.setdefault(item.key, item.label) == item.label


def test_the_same_seed_makes_the_same_day_and_another_one_another() -> None:
    one, again, other = (default_day(seed=seed, per_quarter=20) for seed in (1, 1, 2))
    assert one == again
    assert one.items != other.items


def test_the_report_is_told_the_mix_and_the_repeats() -> None:
    (note,) = default_day(seed=1, per_quarter=5).notes
    assert "quarter 2: aiw 35%" in note
    assert "30%" in note


def test_a_log_is_cut_into_quarters_in_its_own_order(tmp_path: Path) -> None:
    day = read_day([log(tmp_path, *"abcabdefgh")])
    assert [item.prompt for item in day.items] == list("abcabdefgh")
    assert {len(quarter) for quarter in day.quarters} == {2, 3}
    assert all(before and after for before, after in pairwise(day.quarters))
    assert repeated(day.quarters) == [0, 2, 0, 0]


def test_a_log_with_fewer_rows_than_quarters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrafficUnreadable, match="found 3 rows; a day needs a row for each of its 4 quarters"):
        read_day([log(tmp_path, *"abc")])
