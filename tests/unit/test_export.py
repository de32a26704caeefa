"""Exports: what others can train on, and what must not leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.export import export
from tutelage.errors import TrafficUnreadable

ROW: dict[str, Any] = {
    "messages": [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "Up or down?"},
        {"role": "assistant", "content": "up"},
    ],
    "label": "up",
    "metadata": {"tenant": "t", "embedding": "AAAA"},
}


def write(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_chat_rows_hold_messages_alone_in_the_roles_that_are_taken(tmp_path: Path) -> None:
    out = tmp_path / "chat.jsonl"
    assert export(write(tmp_path, ROW), out, form="openai") == {"rows": 1}
    [row] = read(out)
    assert set(row) == {"messages"}
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]


def test_preferences_are_the_rows_that_have_a_worse_answer(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    counts = export(write(tmp_path, ROW, {**ROW, "chosen": "up", "rejected": "down"}), out, form="preference")
    assert counts == {"rows": 1, "without_preference": 1}
    [row] = read(out)
    assert row["input"]["messages"][-1]["content"] == "Up or down?"
    assert (row["preferred_output"][0]["content"], row["non_preferred_output"][0]["content"]) == ("up", "down")


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    out = tmp_path / "rows.parquet"
    export(write(tmp_path, ROW, {**ROW, "weight": 0.5, "rationale": "it rose"}), out, form="parquet")
    rows = pq.read_table(out).to_pylist()
    assert [row["weight"] for row in rows] == [1.0, 0.5]
    assert rows[1]["rationale"] == "it rose"
    assert rows[0]["messages"][2] == {"role": "assistant", "content": "up"}
    assert json.loads(rows[0]["metadata"]) == {"tenant": "t"}


def test_what_is_personal_or_secret_does_not_leave(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    rows = [ROW, {"prompt": "Mail ada@example.com", "label": "done"}, {"prompt": "key sk-abcdefghijklmnopqrstuvwx", "label": "ok"}]
    assert export(write(tmp_path, *rows), out, form="jsonl") == {"rows": 2, "secret": 1}
    text = out.read_text()
    assert "[email]" in text
    assert "ada@" not in text and "sk-" not in text and "embedding" not in text


@pytest.mark.parametrize(("form", "match"), [("xml", "allowed: jsonl, openai"), ("preference", "chosen")])
def test_what_cannot_be_written_is_refused(tmp_path: Path, form: str, match: str) -> None:
    with pytest.raises(TrafficUnreadable, match=match):
        export(write(tmp_path, ROW), tmp_path / "out", form=form)


def test_a_turn_of_an_unknown_role_is_refused_by_its_row(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}]}
    with pytest.raises(TrafficUnreadable, match="row 2"):
        export(write(tmp_path, ROW, bad), tmp_path / "out", form="openai")
