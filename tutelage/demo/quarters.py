"""What a simulated day was worth, quarter by quarter, against the teacher alone on the same requests.

Pure: observations in, one record out, the section "day" of `tutelage demo --report`. It refuses to know how requests were sent and how the
record is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tutelage.demo.outcome import Answered, Interval, Slice, Trained, resampled, slice_of
from tutelage.scoring import wilson

METHOD = {
    "traffic before": "the day's last quarter, sent again to the teacher alone by a tenant that learns nothing, without cache",
    "traffic after": "the day's last quarter as it was answered; some of its prompts repeat earlier ones of the day",
    "always-teacher": "each quarter's requests, sent again right after it through the same gateway, to the teacher alone and without cache",
    "cost": "every reply's own cost, tries of students that were not served included, and what checking students' answers with the "
    "teacher afterwards cost; training is counted apart",
    "saving": "always-teacher's cost of the same requests that was not paid, by who answered them; cached answers count for the cache, "
    "whoever gave them first",
    "quality": "share right over the teacher's share right on the same requests; the right answer is the generator's, not the teacher's",
    "latency": "seconds until a client of the gateway had the whole answer, the client's own work included",
    "intervals": "95 %: Wilson for shares, percentile bootstrap over requests, paired with the teacher's answers, for savings and quality",
}
COST_BELOW, QUALITY_KEPT, TIMES_FASTER, POINTS_BETTER = 0.65, 0.97, 3.0, 0.15


@dataclass(frozen=True)
class Observed:
    """A quarter as it went: its answers, what the teacher alone answered to the same requests in the same order, how many of them
    repeated a prompt of the day, and what checking students' answers with the teacher cost."""

    served: tuple[Answered, ...]
    alone: tuple[Answered, ...]
    repeated: int
    checks_usd: float = 0.0


@dataclass(frozen=True)
class Taught:
    """One version that a cycle made, and what was decided on it then."""

    trained: Trained
    version: int
    action: str
    reason: str
    created_at: datetime


@dataclass(frozen=True)
class Cycle:
    """A cycle after quarter `after` (counted from 1); seconds of wall time, in all and by stage."""

    after: int
    seconds: float
    stages: Mapping[str, float]
    taught: tuple[Taught, ...]


@dataclass(frozen=True)
class Decided:
    """A line of the promotion ledger that came while a quarter's requests were answered, not from a cycle."""

    quarter: int
    task: str
    action: str
    student: str
    version: int
    reason: str


@dataclass(frozen=True)
class Latency:
    """Seconds of waiting; None where nobody waited."""

    n: int
    p50_seconds: float | None
    p95_seconds: float | None


@dataclass(frozen=True)
class Saved:
    """Shares of always-teacher's cost; the four parts add up to `share`. `by_escalations`: requests that the teacher answered, after a
    student had tried or at once; tries and checks cost, so theirs are mostly below 0. What nobody answered counts as the teacher's cost and
    saves nothing."""

    share: float | None
    interval95: Interval | None
    by_students: float
    by_cache: float
    by_escalations: float
    by_checks: float


@dataclass(frozen=True)
class Quality:
    """Share right over always-teacher's on the same requests."""

    ratio: float | None
    interval95: Interval | None


@dataclass(frozen=True)
class Quarter:
    """Figures of one quarter. `latency`: of all requests, by who answered, and of always-teacher."""

    n: int
    share_repeated: float
    mix: dict[str, float]
    served: Slice
    alone: Slice
    cost_per_1k_usd: float | None
    alone_cost_per_1k_usd: float | None
    saved: Saved
    quality: Quality
    by_students_right: float | None
    by_students_wilson95: Interval | None
    latency: dict[str, Latency]


@dataclass(frozen=True)
class TaughtOutcome:
    """A version's test on held-out items; `before` is the untrained base's."""

    student: str
    version: int
    task: str
    action: str
    reason: str
    n_train: int
    n_test: int
    majority: float | None
    before: float | None
    after: float | None
    wilson95: Interval | None
    core_seconds: float


@dataclass(frozen=True)
class CycleOutcome:
    after: int
    seconds: float
    stages: dict[str, float]
    versions: tuple[TaughtOutcome, ...]


@dataclass(frozen=True)
class Target:
    """What was asked of the day; `measured` and `met` are None where it could not be measured."""

    what: str
    asked: float
    measured: float | None
    met: bool | None


@dataclass(frozen=True)
class DayOutcome:
    """The section "day" of the report. `at_once`: requests under way at a time, those of always-teacher in `alone_at_once`."""

    at_once: int
    alone_at_once: int
    teacher_seconds: float
    teacher_error_rate: float
    quarters: tuple[Quarter, ...]
    cycles: tuple[CycleOutcome, ...]
    decisions: tuple[Decided, ...]
    targets: tuple[Target, ...]


def quarter(observed: Observed, *, seed: int = 0) -> Quarter:
    """The figures of a quarter; `seed` fixes the bootstrap."""
    served, alone = observed.served, observed.alone
    n, by_students = len(served), [a for a in served if a.by_student]
    right = wilson(sum(a.correct for a in by_students), len(by_students))
    check = observed.checks_usd / max(n, 1)
    full = [a.cost_usd for a in alone]
    paid = [check + (would if a.tier is None else a.cost_usd) for a, would in zip(served, full, strict=True)]
    parts = _slices(served)
    return Quarter(
        n=n,
        share_repeated=observed.repeated / max(n, 1),
        mix={task: sum(a.task == task for a in served) / n for task in sorted({a.task for a in served})},
        served=slice_of(served),
        alone=slice_of(alone),
        cost_per_1k_usd=1000 * sum(paid) / n if n else None,
        alone_cost_per_1k_usd=1000 * sum(full) / len(full) if full else None,
        saved=_saved(served, full, paid, observed.checks_usd, seed),
        quality=Quality(*_ratio([float(a.correct) for a in served], [float(a.correct) for a in alone], seed)),
        by_students_right=right.rate if right.n else None,
        by_students_wilson95=(right.lo, right.hi) if right.n else None,
        latency={name: latency([a.seconds for a in some]) for name, some in {**parts, "always-teacher": alone}.items()},
    )


def day(
    quarters: Sequence[Observed], cycles: Sequence[Cycle], decisions: Sequence[Decided], *,
    at_once: int, alone_at_once: int, teacher_seconds: float, teacher_error_rate: float, seed: int = 0,
) -> DayOutcome:  # fmt: skip
    """The outcome of as much of a day as was observed; the targets are of its last quarter."""
    found = tuple(quarter(observed, seed=seed) for observed in quarters)
    taught = [_taught(one) for cycle in cycles for one in cycle.taught]
    made = iter(taught)
    told = tuple(CycleOutcome(c.after, c.seconds, dict(c.stages), tuple(next(made) for _ in c.taught)) for c in cycles)
    targets = _targets(found[-1], taught) if found else ()
    return DayOutcome(at_once, alone_at_once, teacher_seconds, teacher_error_rate, found, told, tuple(decisions), targets)


def latency(seconds: Sequence[float]) -> Latency:
    import numpy as np

    if not seconds:
        return Latency(0, None, None)
    return Latency(len(seconds), *(float(np.quantile(seconds, q)) for q in (0.5, 0.95)))


def _slices(served: Sequence[Answered]) -> dict[str, list[Answered]]:
    """By who answered; "escalated": a student was asked first."""
    return {
        "all": list(served),
        "cache": [a for a in served if a.cached],
        "students": [a for a in served if a.by_student],
        "escalated": [a for a in served if a.escalated and not a.cached and not a.by_student],
        "teacher": [a for a in served if a.tier == "teacher" and not a.escalated and not a.cached],
    }


def _saved(served: Sequence[Answered], full: Sequence[float], paid: Sequence[float], checks_usd: float, seed: int) -> Saved:
    everything = sum(full)
    kept, interval = _ratio(paid, full, seed)
    if kept is None:
        return Saved(None, None, 0.0, 0.0, 0.0, 0.0)

    def part(which: str) -> float:
        """What its requests would have cost and did not; a sum of equal costs may miss 0 by a rounding, which is none."""
        saved = sum(would - a.cost_usd for a, would in zip(served, full, strict=True) if a.tier and _who(a) == which) / everything
        return round(saved, 12) + 0.0

    bounds = None if interval is None else (1 - interval[1], 1 - interval[0])
    return Saved(1 - kept, bounds, part("students"), part("cache"), part("others"), 0.0 - checks_usd / everything)


def _who(answer: Answered) -> str:
    return "cache" if answer.cached else "students" if answer.by_student else "others"


def _ratio(ours: Sequence[float], theirs: Sequence[float], seed: int) -> tuple[float | None, Interval | None]:
    """Sum over sum, with a bootstrap interval over pairs."""
    import numpy as np

    if len(ours) < 2 or len(ours) != len(theirs) or sum(theirs) <= 0:
        return None, None

    def ratio(a: Any, b: Any, axis: int) -> Any:
        return np.sum(a, axis=axis) / np.sum(b, axis=axis)

    return sum(ours) / sum(theirs), resampled((ours, theirs), ratio, paired=True, seed=seed)


def _taught(one: Taught) -> TaughtOutcome:
    t = one.trained
    before_n = t.n_test if t.before_n is None else t.before_n
    right = wilson(t.after_correct, t.n_test) if t.after_correct is not None and t.n_test else None
    return TaughtOutcome(
        student=str(t.student),
        version=one.version,
        task=t.task,
        action=one.action,
        reason=one.reason,
        n_train=t.n_train,
        n_test=t.n_test,
        majority=t.majority_correct / t.n_test if t.n_test else None,
        before=t.before_correct / before_n if t.before_correct is not None and before_n else None,
        after=right.rate if right else None,
        wilson95=(right.lo, right.hi) if right else None,
        core_seconds=t.core_seconds,
    )


def _targets(last: Quarter, taught: Sequence[TaughtOutcome]) -> tuple[Target, ...]:
    gains = [one.after - one.before for one in taught if one.action != "refuse" and one.after is not None and one.before is not None]
    alone, served = last.latency["always-teacher"].p50_seconds, last.latency["all"].p50_seconds
    asked = {
        "cost below always-teacher, last quarter": (COST_BELOW, last.saved.share),
        "share of always-teacher's quality kept, last quarter": (QUALITY_KEPT, last.quality.ratio),
        "times as fast as always-teacher at the median, last quarter": (TIMES_FASTER, alone / served if alone and served else None),
        "points of accuracy that students gained over the untrained base, mean": (
            POINTS_BETTER, sum(gains) / len(gains) if gains else None,
        ),
    }  # fmt: skip
    return tuple(Target(what, least, found, None if found is None else found >= least) for what, (least, found) in asked.items())
