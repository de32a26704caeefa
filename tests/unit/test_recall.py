"""Recalling earlier answers, and putting them before a request."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.routing.recall import Recall, Recalled, in_context

ROWS = np.eye(4, dtype=np.float32)
ANSWERS = [Recalled(f"question {number}", f"answer {number}") for number in range(4)]


def test_the_most_similar_come_first_and_the_dissimilar_not_at_all() -> None:
    asked = np.array([0.8, 0.6, 0, 0], dtype=np.float32)

    found = Recall(ANSWERS, ROWS).nearest(asked, least=0.5)
    assert [(r.answer, round(r.similarity, 2)) for r in found] == [("answer 0", 0.8), ("answer 1", 0.6)]
    assert [r.answer for r in Recall(ANSWERS, ROWS).nearest(asked, least=0.7)] == ["answer 0"]
    assert len(Recall(ANSWERS, ROWS).nearest(asked, most=1, least=0.0)) == 1


def test_an_answer_can_be_kept_from_recalling_itself() -> None:
    assert [r.answer for r in Recall(ANSWERS, ROWS).nearest(ROWS[0], most=1, least=-1, but_not=0)] != ["answer 0"]


def test_an_empty_record_recalls_nothing_and_lengths_must_agree() -> None:
    assert Recall([], np.zeros((0, 4), dtype=np.float32)).nearest(ROWS[0]) == []
    with pytest.raises(ValueError, match="one embedding for each"):
        Recall(ANSWERS, ROWS[:3])


def test_recalled_turns_stand_before_the_last_message_the_most_similar_nearest() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "now"}]
    turns = in_context(messages, ANSWERS[:2])

    assert [turn["content"] for turn in turns] == ["be brief", "question 1", "answer 1", "question 0", "answer 0", "now"]
    assert in_context(messages, []) == messages
