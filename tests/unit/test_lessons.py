from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from tutelage.lessons import lesson
from tutelage.records import Attempt

SURE = Attempt("acme-sums", "teacher", "d1", "4", 3.0, 0.95, True, "0.95 reaches 0.85", 3)


def told(**changes: Any) -> dict[str, Any]:
    """The line of one recorded request; a row as the database gives it, the teacher's unless said otherwise."""
    row = {
        "request_id": "r1", "messages": [{"role": "user", "content": "2 + 2"}], "answer": "4", "model": "big", "tier": "teacher",
        "finish_reason": "stop", "domain": "sums", "confidence": None, "feedback_label": None, "feedback_score": None,
        "created_at": datetime(2026, 11, 26, tzinfo=UTC), "embedding": None, "attempts": [],
    }  # fmt: skip
    found = lesson(row | changes, "ten_a")
    assert found is not None
    return {"answer": found["messages"][-1]["content"], **found["metadata"]}


def test_the_teachers_answer_is_learned_as_the_teachers() -> None:
    learned = told()
    assert (learned["answer"], learned["provenance"], learned["teacher"]) == ("4", "teacher", "big")


def test_a_student_that_became_a_teacher_teaches_as_a_student() -> None:
    learned = told(model="acme-sums", attempts=[SURE])
    assert (learned["answer"], learned["provenance"], learned["teacher"]) == ("4", "student", "acme-sums")


def test_what_a_user_says_is_right_stands_before_what_a_student_said() -> None:
    learned = told(model="acme-sums", attempts=[SURE], feedback_label="four", feedback_score=0.0)
    assert (learned["answer"], learned["provenance"], learned["verdict"]) == ("four", "user", 1.0)


def test_a_student_that_is_no_teacher_teaches_nothing_by_itself() -> None:
    row = {"tier": "ta", "model": "acme-sums", "feedback_label": None, "answer": "4", "attempts": [SURE]}
    assert lesson(row, "ten_a") is None


def test_an_overruled_try_leaves_the_answer_the_teachers() -> None:
    learned = told(attempts=[replace(SURE, accepted=False)])
    assert (learned["provenance"], learned["teacher"]) == ("teacher", "big")
