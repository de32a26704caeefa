"""One recorded interaction as a row of distillation data: the answer to learn, who gave it, and all that speaks for or against it.

Pure. It refuses to know databases, files and which rows are good enough: curation decides that.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any


def lesson(row: Mapping[str, Any], tenant_id: str) -> dict[str, Any] | None:
    """The teacher's answer, or the user's own where a student answered; None where there is nothing to learn. A student that has become a
    teacher may teach too, as a student: nothing is judged by its answers.

    `row` is one of `stores.interactions.read_interactions`; the result is a line of interactions.jsonl.
    """
    by_student = any(a.accepted and a.model == row["model"] for a in row["attempts"])
    by_teacher = row["tier"] == "teacher" and not by_student
    by_graduate = row["tier"] == "teacher" and by_student and row["feedback_label"] is None
    if by_teacher and row["finish_reason"] not in (None, "stop"):
        return None  # cut off by a limit, a client that left or a fault: half an answer is no answer to learn
    answer = row["answer"] if by_teacher or by_graduate else row["feedback_label"]
    if answer is None:
        return None
    score = row["feedback_score"] if by_teacher or by_graduate else 1.0
    return {
        "messages": [*row["messages"], {"role": "assistant", "content": answer}],
        "metadata": {
            "request_id": row["request_id"],
            "tenant": tenant_id,
            "domain": row["domain"],
            "teacher": row["model"] if by_teacher or by_graduate else None,
            "confidence": row["confidence"],
            "verdict": None if score is None else float(score >= 0.5),
            "label": row["feedback_label"],
            "provenance": "teacher" if by_teacher else "student" if by_graduate else "user",
            "created_at": row["created_at"].isoformat(),
            "scores": {} if row["feedback_score"] is None else {"feedback": float(row["feedback_score"])},
            "attempts": _attempts(row),
            "embedding": _as_text(row["embedding"]),
        },
    }


def _attempts(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What cheaper models said to it, each with its calibrated confidence: the served answer of a student is the last of them."""
    tried = [{"model": a.model, "answer": a.answer, "confidence": a.confidence} for a in row["attempts"] if a.answer]
    served = row["tier"] != "teacher" and row["answer"] and all(a["answer"] != row["answer"] for a in tried)
    return [*tried, {"model": row["model"], "answer": row["answer"], "confidence": row["confidence"]}] if served else tried


def _as_text(embedding: bytes | None) -> str | None:
    """Float32 bytes as base64 of float16: a kilobyte a row, so that curation need not encode again what routing encoded."""
    if embedding is None:
        return None
    import numpy as np

    return base64.b64encode(np.frombuffer(embedding, dtype=np.float32).astype(np.float16).tobytes()).decode()
