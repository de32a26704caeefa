"""Candidate and champion meet on the held-out items of both: each is asked what it was never asked."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from flows.gate import paired, paired_before, remembered
from flows.students import CHAMPIONS, EARLIER, unasked
from tutelage.evolution.evidence import Tally


def version(folder: Path, held_out: list[str], right: set[str]) -> Path:
    (folder / "curated").mkdir(parents=True)
    rows = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "x"}]} for p in held_out]
    (folder / "curated" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictions(folder / "predictions.jsonl", {prompt: prompt in right for prompt in held_out})
    (folder / "evaluate.yaml").write_text("{batch: 4, untrained_items: 30}")
    return folder


def asks(owner: Path, asked: Path, answers: Path) -> int:
    return unasked(owner, asked, answers.parent, settings=owner / "evaluate.yaml")


def predictions(file: Path, right: dict[str, bool]) -> None:
    file.write_text("".join(json.dumps({"prompt": prompt, "correct": correct}) + "\n" for prompt, correct in right.items()))


def test_what_is_new_to_the_champion_counts_once_it_was_asked(tmp_path: Path) -> None:
    champion = version(tmp_path / "v1", ["a", "b", "c"], {"a", "b", "c"})
    candidate = version(tmp_path / "v2", ["b", "c", "d", "e"], {"b", "c", "d", "e"})

    assert paired(candidate, champion) == Tally(0, 2, 0)
    assert asks(candidate, champion, candidate / CHAMPIONS) == 2
    asked = [json.loads(line)["messages"][0]["content"] for line in (candidate / "champion" / "unasked.jsonl").read_text().splitlines()]
    assert asked == ["d", "e"]
    predictions(candidate / CHAMPIONS, {"d": False, "e": True})
    assert paired(candidate, champion) == Tally(1, 3, 0)


def test_the_champion_is_asked_as_the_candidate_was_but_no_untrained_base_beside_it(tmp_path: Path) -> None:
    candidate = version(tmp_path / "v2", ["a"], set())

    assert asks(candidate, version(tmp_path / "v1", [], set()), candidate / CHAMPIONS) == 1
    assert yaml.safe_load((candidate / "champion" / "evaluate.yaml").read_text()) == {"batch": 4, "untrained_items": 0}


def test_a_champion_that_knows_all_items_is_not_asked_again(tmp_path: Path) -> None:
    candidate = version(tmp_path / "v2", ["a"], set())
    assert asks(candidate, version(tmp_path / "v1", ["a", "b"], set()), candidate / CHAMPIONS) == 0


def test_what_the_champion_knew_of_its_time_counts_against_who_forgot_it(tmp_path: Path) -> None:
    champion = version(tmp_path / "v1", ["a", "b", "c"], {"a", "b"})
    candidate = version(tmp_path / "v2", ["c", "d"], {"c", "d"})

    assert paired_before(candidate, champion) == Tally(1, 0, 0)
    assert asks(champion, candidate, candidate / EARLIER) == 2
    predictions(candidate / EARLIER, {"a": True, "b": False})
    assert paired_before(candidate, champion) == Tally(1, 1, 1)
    assert paired(candidate, champion) == Tally(1, 0, 0), "what is earlier says nothing of who knows the present better"


def test_a_champion_whose_items_were_erased_has_none_to_ask(tmp_path: Path) -> None:
    candidate, champion = version(tmp_path / "v2", ["a"], set()), version(tmp_path / "v1", ["b"], set())
    (champion / "curated" / "test.jsonl").unlink()
    assert asks(champion, candidate, candidate / EARLIER) == 0


def test_canaries_are_compared_where_both_were_asked() -> None:
    reports = [{"canaries": {"right": right}} for right in ({"1": True, "2": False, "3": True}, {"2": True, "3": True, "4": True})]

    assert remembered(*reports) == Tally(0, 1, 1)
    assert remembered(reports[0], {}) == Tally()
