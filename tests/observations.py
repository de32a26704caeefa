"""Made-up observations of a demo, of the shape and size of a real one, for tests of its report. No figure here was measured."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from datetime import UTC, datetime

from tutelage.demo import quarters
from tutelage.demo.outcome import (
    Answered,
    CurvePoint,
    Decision,
    NextStep,
    Prediction,
    Prices,
    Run,
    Teacher,
    Trained,
)
from tutelage.demo.quarters import DayOutcome
from tutelage.records import Tier

# task: (how often the student is right, its majority baseline, decision)
STUDENTS: dict[str, tuple[float, float, Decision]] = {
    "aiw": (0.97, 0.15, "promoted"),
    "family_relationships": (0.82, 0.33, "promoted"),
    "number_sequence": (0.58, 0.03, "kept_student"),
    "chain_sum": (0.55, 0.03, "kept_student"),
    "spell_backward": (0.0, 0.01, "refused"),
}
THRESHOLD = 0.85


def answered(*, seed: int = 0, per_task: int = 120) -> list[Answered]:
    """Before: the teacher alone. After: a cascade of students that know fairly well when they are right."""
    rng = random.Random(seed)
    answers = []
    for task, (ability, _, decision) in STUDENTS.items():
        for _ in range(per_task):
            answers.append(Answered(task, "before", rng.random() < 0.99, rng.uniform(1e-4, 3e-4), "teacher"))
        for _ in range(per_task):
            answers.append(_after(task, ability, decision, rng))
    return answers


def trained(*, seed: int = 0, held_out: int = 90) -> list[Trained]:
    rng = random.Random(seed)
    return [_trained(task, *facts, held_out, rng) for task, facts in STUDENTS.items()]


def run(**changes: object) -> Run:
    values: dict[str, object] = {
        "wall_seconds": 1322.0,
        "peak_rss_mb": 5210.0,
        "memory_measure": "PSS",
        "source": "made up for a test",
        "learnable": frozenset(STUDENTS) - {"spell_backward"},
        "teacher": Teacher("recorded-teacher", "recorded"),
        "prices": Prices(2.5, 10.0, 0.04),
        "threshold": THRESHOLD,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "bentoml": "1.4.39"},
        "notes": ("aiw has 700 different prompts where 800 were asked for",),
        "next_steps": (
            NextStep("tutelage serve", "the gateway again, at http://127.0.0.1:8080/v1"),
            NextStep("tutelage ui", "Prefect (the cycle, its artifacts) and MLflow (every version with its evidence)"),
            NextStep('eval "$(tutelage env)"; bentoml list', "the Bentos of the promoted students"),
        ),
    }
    return Run(**{**values, **changes})  # type: ignore[arg-type]


def day() -> DayOutcome:
    """Two quarters: the teacher and the cache alone, then the students of `trained` too."""
    answers = answered()
    alone, served = ([replace(a, seconds=s) for a in answers if a.phase == phase] for phase, s in (("before", 0.5), ("after", 0.2)))
    first = [replace(a, phase="after", cached=n % 4 == 0, cost_usd=0.0 if n % 4 == 0 else a.cost_usd) for n, a in enumerate(alone)]
    seen = [quarters.Observed(tuple(some), tuple(alone), 100, checks) for some, checks in ((first, 0.0), (served, 0.002))]
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    taught = tuple(quarters.Taught(t, 1, "refuse" if t.decision == "refused" else "promote", t.reason, moment) for t in trained())
    cycle = quarters.Cycle(1, 300.0, {"finetune": 200.0, "evaluate": 90.0}, taught)
    decided = quarters.Decided(2, "aiw", "advance", "demo-aiw", 1, "from 0 % to 1 %")
    return quarters.day(seen, [cycle], [decided], at_once=2, alone_at_once=16, teacher_seconds=0.5, teacher_error_rate=0.05)


def _after(task: str, ability: float, decision: Decision, rng: random.Random) -> Answered:
    if decision == "refused":
        return Answered(task, "after", rng.random() < 0.99, rng.uniform(1e-4, 3e-4), "teacher")
    guess = _prediction(ability, rng)
    tier: Tier = "ta" if decision == "promoted" else "student"
    name = f"demo-{task}"
    if guess.confidence >= THRESHOLD:
        return Answered(task, "after", guess.correct, 2e-6, tier, False, guess.confidence, name, False, guess.correct)
    cost = rng.uniform(1e-4, 3e-4) + 2e-6
    return Answered(task, "after", True, cost, "teacher", False, guess.confidence, name, True, guess.correct)


def _prediction(ability: float, rng: random.Random) -> Prediction:
    """Confidence near 0 or near 1 mostly, right about as often as it says."""
    odds = math.log((ability + 0.01) / (1.01 - ability)) + rng.gauss(0, 3)
    confidence = 1 / (1 + math.exp(-odds))
    return Prediction(confidence, rng.random() < confidence)


def _trained(task: str, ability: float, majority: float, decision: Decision, held_out: int, rng: random.Random) -> Trained:
    right = round(ability * held_out)
    reason = f"{right} of {held_out} held-out items right, majority {majority:.2f}"
    steps = 60 if decision == "refused" else 400
    curve = [CurvePoint(step, 2.5 * math.exp(-step / 80) + 0.15 * rng.random() + 0.1) for step in range(0, steps, 5)]
    for step in range(0, steps + 1, 50):
        share = ability * (1 - math.exp(-step / 100))
        curve.append(CurvePoint(step, None, 2.5 * math.exp(-step / 80) + 0.2, share))
    return Trained(
        task=task,
        student=f"demo-{task}",
        decision=decision,
        reason=f"not learnable: validation loss did not fall in the probe; {reason}" if decision == "refused" else reason,
        n_train=560,
        n_test=held_out,
        majority_correct=round(majority * held_out),
        before_correct=1,
        after_correct=right,
        predictions=tuple(_prediction(ability, rng) for _ in range(held_out)) if decision != "refused" else (),
        curve=tuple(curve),
        core_seconds=60.0 if decision == "refused" else 300.0,
    )
