"""A student silently gets worse by 15 points: how soon does the router notice, and how often does it suspect a healthy one?

    python -m benchmarks.drift --report drift.json

Requests are simulated, everything that decides is what production runs: `confidence.fit`, `confidence.Calibrator`, `policy.accept`,
`exploration.explore` and `drift.watch`, with the shares of configs/routing.yaml. A student's answer is right with a probability that its
score tells (its calibrator learned that from 200 held-out outcomes); from the drift on, each right answer is wrong with the same chance
whatever its score, so that accuracy over all requests falls by 15 points and no score shows it. Outcomes are seen as in production: every
answer that was not given is compared with the teacher's, of those given the shadow share; no user sends feedback. A gateway looks at new
outcomes every half second: here every LOOK requests.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.routing import confidence
from tutelage.routing.drift import looked_at, watch
from tutelage.routing.exploration import Exploration, explore
from tutelage.routing.policy import Policy, StudentSnapshot, judge
from tutelage.routing.strategies import Candidate, Situation, Step, plan
from tutelage.settings import CHECKOUT, RoutingSettings, load

BEFORE, AFTER, WINDOW = 1000, 300, 100  # requests until the drift, after it, and of the share that is reported
ACCURACY = 0.766  # of the simulated student over all requests: the mean of its true probabilities
LABELS, LOOK = 200, 10


@dataclass(frozen=True)
class Week:
    """One simulated run. Shares are of requests that the student's answer was given to; `drop`: points of accuracy it lost."""

    before: float
    after: float
    noticed: int | None  # requests after the drift until the share of the last WINDOW requests was half of `before`
    wrong_given: float  # of answers given in the requests after the drift


def simulate(seed: int, *, drop: float, routing: RoutingSettings) -> Week:
    """One student, one domain; `drop` 0: it stays as it is."""
    random = np.random.default_rng(seed)
    scores, right = _answers(random, LABELS)
    trained = confidence.fit(scores.tolist(), right.tolist())
    all_scores, all_right = _answers(random, BEFORE + AFTER)
    lost = drop / ACCURACY
    exploration = Exploration(routing.explore, routing.explore_floor)
    seen: list[tuple[float, float]] = []
    given = np.zeros(BEFORE + AFTER, dtype=bool)
    wrong = 0
    for i, (score, is_right) in enumerate(zip(all_scores, all_right, strict=True)):
        value = float(is_right and not (i >= BEFORE and random.random() < lost))
        if i % LOOK == 0:
            student = StudentSnapshot("s", 1, "ta", "d", "x", watch(trained, seen[-routing.outcome_window :]).calibrator, routing.threshold)
        step = _step(student, routing, exploration, random)
        share = looked_at(routing.shadow, student.calibrator)
        if step is None:  # too doubtful to be asked: asked after the reply for the shadow share
            if random.random() < share:
                seen.append((float(score), value))
            continue
        given[i] = judge(student, float(score), needed=step.least or 0.0).accepted
        wrong += bool(given[i]) and i >= BEFORE and not value
        if not given[i] or random.random() < share:
            seen.append((float(score), value))
    before = float(given[:BEFORE].mean())
    shares = [float(given[i - WINDOW : i].mean()) for i in range(BEFORE + WINDOW // 2, BEFORE + AFTER + 1)]
    noticed = next((i + WINDOW // 2 for i, share in enumerate(shares) if share <= before / 2), None)
    return Week(before, float(given[-WINDOW:].mean()), noticed, wrong / max(1, int(given[BEFORE:].sum())))


def _answers(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (log-odds) and whether the answers are right, of a student that is right in ACCURACY of all."""
    scores = random.normal(2.5, 2.0, n)
    return scores, random.random(n) < 1 / (1 + np.exp(-_log_odds(scores)))


def _log_odds(scores: np.ndarray) -> np.ndarray:
    return 0.8 * scores - 0.3  # a little too sure of itself, as small models are


def _step(student: StudentSnapshot, routing: RoutingSettings, exploration: Exploration, random: np.random.Generator) -> Step | None:
    """How the student is to be asked, if at all."""
    policy = Policy(0, routing.threshold, routing.similarity)
    candidate = Candidate(student.name, student.tier, routing.student_microusd, student=student)
    situation = Situation("d", 1.0, (Candidate("teacher", "teacher", 1000),), (candidate,), policy, routing.threshold)
    planned = explore(plan("quality", situation), exploration, drawn=random.random(), which=random.random())
    return planned.steps[0] if planned.shape == "cascade" else None


def report(runs: int, routing: RoutingSettings) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import track

    def all_of(drop: float) -> list[Week]:
        told = f"{runs} runs, {drop:.0%} lost"
        return [simulate(seed, drop=drop, routing=routing) for seed in track(range(runs), told, console=Console(stderr=True))]

    drifted, healthy = all_of(0.15), all_of(0.0)
    return {
        "runs": runs, "requests_before": BEFORE, "requests_after": AFTER, "window": WINDOW,
        "shadow": routing.shadow, "explore": routing.explore, "threshold": routing.threshold,
        "share_before": _mean([w.before for w in drifted]), "share_after": _mean([w.after for w in drifted]),
        "ratio": _mean([w.after / w.before for w in drifted if w.before]),
        "halved": _rate([w.before > 0 and w.after <= w.before / 2 for w in drifted]),
        "requests_until_halved": _quantiles([w.noticed for w in drifted]),
        "wrong_given_after": _mean([w.wrong_given for w in drifted]),
        "healthy": {
            "share_before": _mean([w.before for w in healthy]), "share_after": _mean([w.after for w in healthy]),
            "halved": _rate([w.before > 0 and w.after <= w.before / 2 for w in healthy]),
            "wrong_given": _mean([w.wrong_given for w in healthy]),
        },
    }  # fmt: skip


def _mean(values: Sequence[float]) -> dict[str, float]:
    """With a 95 % interval over runs, by the normal approximation."""
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": mean, "lo": mean - half, "hi": mean + half}


def _rate(hits: Sequence[bool]) -> dict[str, float]:
    from tutelage.scoring import wilson

    found = wilson(sum(hits), len(hits))
    return {"k": found.k, "n": found.n, "rate": found.rate, "lo": found.lo, "hi": found.hi}


def _quantiles(noticed: Sequence[int | None]) -> dict[str, float | None]:
    """Of requests until it was halved; null where a quantile lies beyond the run."""
    ordered = np.sort([math.inf if n is None else n for n in noticed])
    found = {str(q): float(ordered[min(len(ordered) - 1, int(q * len(ordered)))]) for q in (0.1, 0.5, 0.9)}
    return {q: value if math.isfinite(value) else None for q, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=200)
    arguments = parser.parse_args()
    found = report(arguments.runs, load(RoutingSettings, CHECKOUT / "configs"))
    arguments.report.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
