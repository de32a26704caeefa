"""What a cycle's page tells."""

from __future__ import annotations

import json
from pathlib import Path

from flows.gate import Judged
from flows.story import saving, story
from flows.students import Student
from flows.workshop import Cycle
from tutelage.evolution.gaps import EvolveSettings, Traffic, measure
from tutelage.evolution.promotion import Evidence, Verdict
from tutelage.stores.registry import Pointer


def judged(folder: Path, action: str) -> Judged:
    report = {"n": 100, "core_seconds": 90.0, "confident": {"share": 0.75}}
    (folder / "report.json").write_text(json.dumps(report))
    evidence = Evidence(
        n=100, correct=90, wins=90, accuracy=0.9, lower=0.83, upper=0.94, majority=0.2, confidence=0.9, ece=0.03, learnable=True,
        learnable_reason="rose", before=0.05,
    )  # fmt: skip
    verdict = Verdict(action, "ta" if action == "promote" else None, "90 of 100 held-out items right")  # type: ignore[arg-type]
    return Judged(Student("acme-sums", 2, "sums", folder, 400), evidence, verdict, Pointer())


def test_it_tells_the_gap_the_student_the_verdict_and_the_cost_before_and_after(tmp_path: Path) -> None:
    gaps = measure([Traffic("sums", 400, 400, 400, 240_000), Traffic("dates", 5, 5, 5, 100)], EvolveSettings(), tried={})
    entry = judged(tmp_path, "promote")
    saved = saving(entry, gaps[0], 0.04)
    told = story(Cycle("c1", "ten_a", "acme", tmp_path, tmp_path, ""), gaps, [entry], {"sums": saved})

    assert (saved.before, saved.after) == (600, 10 + 0.25 * 600), "0.9 core-seconds of an answer cost 10 micro-dollars"
    for expected in ("Cycle c1 of acme", "sums: train", "dates: wait", "0.05 untrained, **0.90** trained", "**promote**", "sure of 75%"):
        assert expected in told


def test_one_that_may_not_serve_saves_nothing(tmp_path: Path) -> None:
    (gap,) = measure([Traffic("sums", 400, 400, 400, 240_000)], EvolveSettings(), tried={})
    saved = saving(judged(tmp_path, "refuse"), gap, 0.04)

    assert (saved.after, saved.per_day) == (saved.before, 0)
