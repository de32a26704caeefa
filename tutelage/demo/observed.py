"""What a demo's database and students' folders know of it, as the observations that reports are computed from.

It refuses to compute a figure: `outcome` and `quarters` do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tutelage.demo.client import Sent
from tutelage.demo.outcome import Answered, CurvePoint, Decision, Phase, Prediction, Trained
from tutelage.scoring import matches
from tutelage.stores import interactions, registry
from tutelage.stores.database import open_pool
from tutelage.stores.datasets import read_curve

DECISIONS: dict[str, Decision] = {
    "ta": "promoted", "teacher": "promoted", "student": "kept_student", "challenger": "kept_student", "waiting": "kept_student",
    "refused": "refused",
}  # fmt: skip
Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Records:
    """What is on record of one tenant: interactions by request, student versions with their evidence, the ledger's decisions, and the
    cost of asking the teacher afterwards what students' answers were worth (time and micro-dollars)."""

    rows: Rows
    versions: tuple[Mapping[str, Any], ...]
    promotions: tuple[Mapping[str, Any], ...]
    shadows: tuple[tuple[datetime, int], ...]


async def read(database_url: str, tenant_id: str) -> Records:
    pool = await open_pool(database_url, size=2)
    try:
        rows = await interactions.read_interactions(pool, tenant_id, limit=1_000_000)
        versions = [v for v in await registry.list_versions(pool) if v["tenant_id"] == tenant_id and v["evidence"]]
        promotions = [p for p in await registry.list_promotions(pool) if p["tenant_id"] == tenant_id]
        shadows = await pool.fetch(
            "select created_at, cost_microusd from interactions where tenant_id = $1 and endpoint = 'shadow' order by created_at", tenant_id
        )
    finally:
        await pool.close()
    by_id = {row["request_id"]: row for row in rows}
    return Records(by_id, tuple(versions), tuple(promotions), tuple((s["created_at"], s["cost_microusd"]) for s in shadows))


def answered(sent: Sent, phase: Phase, rows: Rows) -> Answered:
    """What became of a request. A student that rose to tier `teacher` counts as TA: a report's teacher is the model that is paid for."""
    row = rows.get(sent.request_id)
    if row is None:
        return Answered(sent.item.task, phase, sent.correct, 0.0, None, seconds=sent.seconds)
    tried = row["attempts"][0] if row["attempts"] else None
    return Answered(
        task=sent.item.task,
        phase=phase,
        correct=sent.correct,
        # the header has fractions of a micro-dollar, which the ledger rounds
        cost_usd=float(sent.headers.get("x-tutelage-cost-usd", row["cost_microusd"] / 1e6)),
        tier="ta" if row["tier"] == "teacher" and tried and tried.accepted else row["tier"],
        cached=row["cache"].startswith("hit"),
        confidence=tried.confidence if tried else None,
        student=tried.model if tried else None,
        escalated=bool(tried and not tried.accepted),
        student_correct=matches(tried.answer, sent.item.label) if tried else None,
        seconds=sent.seconds,
    )


def tasks_of(sent: Sequence[Sent], rows: Rows) -> dict[str, str]:
    """For each domain found the task that most of its requests came from."""
    counts: dict[str, Counter[str]] = {}
    for one in sent:
        domain = (rows.get(one.request_id) or {}).get("domain")
        if domain is not None:
            counts.setdefault(domain, Counter())[one.item.task] += 1
    return {domain: tasks.most_common(1)[0][0] for domain, tasks in counts.items()}


def trained(sent: Sequence[Sent], records: Records, versions: Sequence[Mapping[str, Any]]) -> list[Trained]:
    """One record for each of the versions, under its domain's task; tasks without one have a record too."""
    tasks = tasks_of(sent, records.rows)
    found = [student(v, tasks[v["domain"]]) for v in versions if v["domain"] in tasks and v["status"] in DECISIONS]
    for task in sorted({one.item.task for one in sent} - {record.task for record in found}):
        reason = "no gap of this task was worth a student; see: tutelage gaps"
        found.append(Trained(task, None, "refused", reason, 0, 0, 0, None, None))
    return found


def student(version: Mapping[str, Any], task: str) -> Trained:
    folder, evidence = Path(version["path"]), version["evidence"]
    report = json.loads((folder / "report.json").read_text())
    untrained = report["untrained"]
    return Trained(
        task=task,
        student=version["student"],
        decision=DECISIONS[version["status"]],
        reason=version["reason"],
        n_train=evidence["n_train"],
        n_test=report["n"],
        majority_correct=report["majority_n"],
        before_correct=untrained["correct"] if untrained["n"] else None,
        before_n=untrained["n"] or None,
        after_correct=report["correct"],
        predictions=tuple(
            Prediction(p["probability"], p["correct"]) for p in _lines(folder / "predictions.jsonl") if p["probability"] is not None
        ),
        curve=tuple(
            CurvePoint(int(r["step"]), r["loss"], r.get("val_loss"), r.get("val_accuracy")) for r in read_curve(folder / "curve.csv")
        ),
        core_seconds=evidence.get("core_seconds", 0.0),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
