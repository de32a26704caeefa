"""Recordings and prices: the parts of a backend that need no server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tutelage.errors import ConfigInvalid, NotFound
from tutelage.fleet.backends import RecordedBackend, build, count_prompt, list_price, read_recording
from tutelage.settings import ModelEntry, Price

PRICE = Price(input_per_mtok=2.5, output_per_mtok=10.0)


def recorded(tmp_path: Path, *lines: str) -> RecordedBackend:
    (tmp_path / "r.jsonl").write_text("\n".join(lines) + "\n")
    return RecordedBackend("recorded-teacher", tmp_path / "r.jsonl", price=PRICE, count_tokens=lambda text: len(text.split()))


async def test_a_recording_answers_the_conversation_it_recorded_and_prices_it(tmp_path: Path) -> None:
    backend = recorded(tmp_path, '{"prompt": "two and two", "answer": "4"}')
    answer = await backend.complete({"messages": [{"role": "user", "content": "two and two"}]})

    assert (answer.text, answer.prompt_tokens, answer.completion_tokens, answer.estimated) == ("4", 10, 1, True)
    assert answer.cost_usd == pytest.approx(10 * 2.5e-6 + 1 * 10e-6)


async def test_a_recording_takes_the_time_it_was_told_to_take(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    entry = ModelEntry(name="slow", kind="recorded", path=str(tmp_path / "r.jsonl"), delay_seconds=0.2)
    started = time.monotonic()
    await build(entry, count_tokens=len).complete({"messages": [{"role": "user", "content": "a"}]})

    assert time.monotonic() - started >= 0.2


async def test_the_same_question_after_another_conversation_is_another_one(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "In French."}, {"role": "user", "content": "two"}]
    backend = recorded(tmp_path, '{"prompt": "two", "label": "2"}', f'{{"messages": {asked}, "answer": "deux"}}'.replace("'", '"'))

    assert (await backend.complete({"messages": asked})).text == "deux"
    assert (await backend.complete({"messages": asked[1:]})).text == "2"
    with pytest.raises(NotFound, match="recording"):
        await backend.complete({"messages": [{"role": "user", "content": "three"}]})


@pytest.mark.parametrize("line", ["not json", '{"prompt": "x"}', "[1]", '{"answer": "x"}'])
def test_a_bad_line_of_a_recording_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(ConfigInvalid, match=r"r\.jsonl:2: expected"):
        read_recording(tmp_path / "r.jsonl")


def test_a_missing_recording_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"nowhere\.jsonl"):
        read_recording(tmp_path / "nowhere.jsonl")


def test_no_price_costs_nothing_and_parts_of_a_message_all_count() -> None:
    parts = [{"type": "text", "text": "one two"}, {"type": "text", "text": "three"}]

    assert list_price(None, 1000, 1000) == 0
    assert count_prompt(lambda text: len(text.split()), {"messages": [{"role": "user", "content": parts}]}) == 3 + 4 + 3
