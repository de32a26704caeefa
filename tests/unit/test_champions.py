"""Candidate and champion meet on the candidate's held-out items: what the champion was never asked, it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from flows.gate import paired, remembered
from flows.students import CHAMPIONS, unasked
from tutelage.evolution.evidence import Tally


def version(folder: Path, held_out: list[str], right: set[str]) -> Path:
    (folder / "curated").mkdir(parents=True)
    rows = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "x"}]} for p in held_out]
    (folder / "curated" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictions(folder / "predictions.jsonl", {prompt: prompt in right for prompt in held_out})
    (folder / "evaluate.yaml").write_text("{batch: 4, untrained_items: 30}")
    return folder


def predictions(file: Path, right: dict[str, bool]) -> None:
    file.write_text("".join(json.dumps({"prompt": prompt, "correct": correct}) + "\n" for prompt, correct in right.items()))


def test_what_is_new_to_the_champion_counts_once_it_was_asked(tmp_path: Path) -> None:
    champion = version(tmp_path / "v1", ["a", "b", "c"], {"a", "b", "c"})
    candidate = version(tmp_path / "v2", ["b", "c", "d", "e"], {"b", "c", "d", "e"})

    assert paired(candidate, champion) == Tally(0, 2, 0)
    assert unasked(candidate, champion) == 2
    asked = [json.loads(line)["messages"][0]["content"] for line in (candidate / "champion" / "unasked.jsonl").read_text().splitlines()]
    assert asked == ["d", "e"]
    predictions(candidate / CHAMPIONS, {"d": False, "e": True})
    assert paired(candidate, champion) == Tally(1, 3, 0)


def test_the_champion_is_asked_as_the_candidate_was_but_no_untrained_base_beside_it(tmp_path: Path) -> None:
    candidate = version(tmp_path / "v2", ["a"], set())

    assert unasked(candidate, version(tmp_path / "v1", [], set())) == 1
    assert yaml.safe_load((candidate / "champion" / "evaluate.yaml").read_text()) == {"batch": 4, "untrained_items": 0}


def test_a_champion_that_knows_all_items_is_not_asked_again(tmp_path: Path) -> None:
    assert unasked(version(tmp_path / "v2", ["a"], set()), version(tmp_path / "v1", ["a", "b"], set())) == 0


def test_canaries_are_compared_where_both_were_asked() -> None:
    reports = [{"canaries": {"right": right}} for right in ({"1": True, "2": False, "3": True}, {"2": True, "3": True, "4": True})]

    assert remembered(*reports) == Tally(0, 1, 1)
    assert remembered(reports[0], {}) == Tally()
