"""What a demo was worth, computed from what was observed: every answered request and every training.

Pure: observations in, one record out, whose `to_dict` is the contract of `tutelage demo --report`. It refuses to know how
requests were sent, how students were trained and how the record is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tutelage.records import Tier
from tutelage.routing.confidence import MAX_BINS, MIN_PER_BIN, ece
from tutelage.scoring import wilson

if TYPE_CHECKING:
    from tutelage.demo.quarters import DayOutcome

Phase = Literal["before", "after"]
Decision = Literal["promoted", "kept_student", "refused"]
Group = Literal["all", "learnable"]
Interval = tuple[float, float]

PHASES: tuple[Phase, ...] = ("before", "after")
TIERS: tuple[Tier, ...] = ("student", "ta", "teacher")
RESAMPLES = 2_000
LEAST_USD = 1e-12  # a mean cost below it, a millionth of a micro-dollar, is none: shares of it would be infinite

METHOD = {
    "before and after": "per domain: the untrained base and the student on the same held-out prompts, which no training saw",
    "majority": "share right of always giving the most frequent answer of those held-out prompts",
    "traffic before": "requests sent over HTTP before any student existed",
    "traffic after": "requests sent over HTTP after the cycle; none shares a prompt with the traffic before",
    "cost": "every reply's own cost, tries of students that were not served included; training is counted apart",
    "intervals": "95 %: Wilson for shares, percentile bootstrap over requests for savings",
    "ece": f"mean gap between stated confidence and share right, over up to {MAX_BINS} bins of equal mass with at least "
    f"{MIN_PER_BIN} answers each",
}


@dataclass(frozen=True)
class Answered:
    """One request and what became of it; `tier` None: nobody answered, which counts as wrong.

    `cost_usd` is all that the request took, `seconds` how long its client waited. `student` names the student that tried, served
    or not, with `confidence`; `escalated`: it tried and the teacher answered. `student_correct`: whether the student's own answer
    was right, None where only the served answer is known.
    """

    task: str
    phase: Phase
    correct: bool
    cost_usd: float
    tier: Tier | None
    cached: bool = False
    confidence: float | None = None
    student: str | None = None
    escalated: bool = False
    student_correct: bool | None = None
    seconds: float = 0.0

    @property
    def by_student(self) -> bool:
        """Whether a student or TA computed the answer that was served."""
        return self.tier in ("student", "ta") and not self.cached


@dataclass(frozen=True)
class Prediction:
    """A calibrated probability of being right, and whether it was."""

    confidence: float
    correct: bool


@dataclass(frozen=True)
class CurvePoint:
    """A moment of a training: losses in nats a token, accuracy in 0..1, None where not measured at that step."""

    step: int
    loss: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None


@dataclass(frozen=True)
class Trained:
    """A student's training and test on one task; one record for each student and task, counts over `n_test` held-out items.

    `majority_correct`: right by always giving the most frequent answer. `before_correct`: by the untrained base, of the
    first `before_n` items (None: of all). `student` and `after_correct` are None where nothing was trained.
    """

    task: str
    student: str | None
    decision: Decision
    reason: str
    n_train: int
    n_test: int
    majority_correct: int
    before_correct: int | None
    after_correct: int | None
    before_n: int | None = None
    predictions: tuple[Prediction, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    core_seconds: float = 0.0


@dataclass(frozen=True)
class Prices:
    """US dollars per million teacher tokens, and per core-hour of CPU."""

    teacher_input_per_mtok_usd: float
    teacher_output_per_mtok_usd: float
    cpu_per_core_hour_usd: float


@dataclass(frozen=True)
class Teacher:
    """Who answered what no student could: a name and its kind in `configs/models.yaml`, and what else is to be told of it."""

    name: str
    kind: Literal["openai", "bento", "recorded"]
    told: str = ""

    @property
    def note(self) -> str:
        """What a reader must know to judge figures that involve this teacher."""
        if self.kind == "recorded":
            return (
                "The teacher is recorded: its answers were read from a file and no model was asked, so its accuracy is that "
                "of the file. Its cost is what the list price would have charged for the tokens." + self.told
            )
        return "The teacher is a live model; its cost is the configured price of the tokens it reported." + self.told


@dataclass(frozen=True)
class NextStep:
    """A command or address to open after the demo, and what it shows."""

    open: str
    shows: str


@dataclass(frozen=True)
class Run:
    """What is known of a run beside its answers.

    `memory_measure`: PSS counts shared pages once, RSS once a process. `threshold`: confidence from which a student's
    answer is served.
    """

    wall_seconds: float
    peak_rss_mb: float
    memory_measure: Literal["PSS", "RSS"]
    source: str
    learnable: frozenset[str]
    teacher: Teacher
    prices: Prices
    threshold: float
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    next_steps: tuple[NextStep, ...] = ()


@dataclass(frozen=True)
class Slice:
    """Some requests together. `share_by_tier` counts fresh answers: with cached and unanswered it adds up to 1.

    Figures are None where there were no requests.
    """

    n: int
    cost_per_1k_usd: float | None
    accuracy: float | None
    accuracy_wilson95: Interval | None
    share_by_tier: dict[str, float]
    share_cached: float
    share_unanswered: float


@dataclass(frozen=True)
class Saving:
    """Share of the cost before that is not paid after, in -inf..1; None where it cannot be computed."""

    share: float | None
    interval95: Interval | None


@dataclass(frozen=True)
class Bin:
    """Predictions of about equal confidence: their mean, the share right with its interval, their number."""

    confidence: float
    accuracy: float
    wilson95: Interval
    n: int


@dataclass(frozen=True)
class Reliability:
    """How far confidence can be believed; `ece` over `n` answers, None where there are none."""

    measured_on: Literal["replayed traffic", "held-out items"]
    n: int
    ece: float | None
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class StudentOutcome:
    """One student on one task: its test on held-out items, and what it did with the traffic after."""

    name: str
    decision: Decision
    reason: str
    n_train: int
    n_test: int
    after: float | None
    wilson95: Interval | None
    share_answered: float
    precision: float | None
    precision_wilson95: Interval | None
    reliability: Reliability
    ece_held_out: float | None
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class DomainOutcome:
    """One task. `ece`, `share_by_student` and `student_precision` are of the traffic after, the rest of held-out items."""

    n_train: int
    n_test: int
    majority: float | None
    before: float | None
    after: float | None
    wilson95: Interval | None
    decision: Decision
    reason: str
    ece: float | None
    share_by_student: float
    student_precision: float | None
    before_wilson95: Interval | None
    student_precision_wilson95: Interval | None
    learnable: bool
    served: dict[Phase, Slice]
    students: tuple[StudentOutcome, ...]


@dataclass(frozen=True)
class Training:
    """What the students cost to make, and after how many requests of such traffic that is earned back (None: never)."""

    core_seconds: float
    cost_usd: float
    break_even_requests: int | None


@dataclass(frozen=True)
class Outcome:
    """Everything a demo's report shows; `day` where a day was simulated: then "before" is the teacher alone on its last quarter."""

    wall_seconds: float
    peak_rss_mb: float
    memory_measure: str
    domains: dict[str, DomainOutcome]
    traffic: dict[Group, dict[Phase, Slice]]
    savings: dict[Group, Saving]
    training: Training
    teacher: dict[str, str]
    prices: Prices
    threshold: float
    versions: dict[str, str]
    source: str
    notes: tuple[str, ...]
    method: dict[str, str]
    next_steps: tuple[NextStep, ...]
    day: DayOutcome | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; the file that `tutelage demo --report` writes."""
        return asdict(self)


def summarise(answers: Sequence[Answered], trained: Sequence[Trained], run: Run, *, seed: int = 0) -> Outcome:
    """The outcome of a run. `seed` fixes the bootstrap. Works on what there is: an interrupted run has no answers after."""
    chosen: dict[Group, list[Answered]] = {
        "all": list(answers),
        "learnable": [a for a in answers if a.task in run.learnable],
    }
    savings = {name: saving(some, seed=seed) for name, some in chosen.items()}
    tasks = sorted({a.task for a in answers} | {t.task for t in trained})
    return Outcome(
        wall_seconds=run.wall_seconds,
        peak_rss_mb=run.peak_rss_mb,
        memory_measure=run.memory_measure,
        domains={task: _domain(task, answers, trained, run.learnable) for task in tasks},
        traffic={name: _by_phase(some) for name, some in chosen.items()},
        savings=savings,
        training=training_of(answers, trained, run.prices),
        teacher={"name": run.teacher.name, "kind": run.teacher.kind, "note": run.teacher.note},
        prices=run.prices,
        threshold=run.threshold,
        versions=dict(run.versions),
        source=run.source,
        notes=run.notes,
        method=METHOD,
        next_steps=run.next_steps,
    )


def saving(answers: Sequence[Answered], *, seed: int) -> Saving:
    """1 - mean cost after / mean cost before, of what was answered, with a bootstrap interval over requests."""
    import numpy as np

    before, after = ([a.cost_usd for a in answers if a.phase == phase and a.tier is not None] for phase in PHASES)
    if min(len(before), len(after)) < 2 or sum(before) / len(before) < LEAST_USD:
        return Saving(None, None)

    def saved(old: Any, new: Any, axis: int) -> Any:
        return 1.0 - np.mean(new, axis=axis) / np.mean(old, axis=axis)

    interval = resampled((before, after), saved, paired=False, seed=seed)
    share = 1.0 - (sum(after) / len(after)) / (sum(before) / len(before))
    return Saving(share, interval)


def resampled(samples: Sequence[Sequence[float]], statistic: Callable[..., Any], *, paired: bool, seed: int) -> Interval | None:
    """95 % percentile bootstrap interval of a statistic of two samples; None where a resample has no finite one."""
    import numpy as np
    from scipy.stats import bootstrap

    with np.errstate(all="ignore"):  # a resample may draw free requests only
        found = bootstrap(
            samples, statistic, paired=paired, n_resamples=RESAMPLES, batch=100, method="percentile", rng=np.random.default_rng(seed)
        ).confidence_interval
    bounds = (float(found.low), float(found.high))
    return bounds if all(map(math.isfinite, bounds)) else None


def reliability(predictions: Sequence[Prediction], measured_on: Literal["replayed traffic", "held-out items"]) -> Reliability:
    """Calibration error and diagram bins of one student's predictions."""
    if not predictions:
        return Reliability(measured_on, 0, None, ())
    bins = max(1, min(MAX_BINS, len(predictions) // MIN_PER_BIN))
    error = ece([p.confidence for p in predictions], [p.correct for p in predictions], bins=bins)
    return Reliability(measured_on, len(predictions), error, tuple(_bins(predictions, len(predictions) / bins)))


def _bins(predictions: Sequence[Prediction], size: float) -> list[Bin]:
    """Bins of at least `size` predictions by rising confidence; equal confidences are never torn apart."""
    parts: list[list[Prediction]] = [[]]
    for prediction in sorted(predictions, key=lambda p: p.confidence):
        full = len(parts[-1]) >= math.floor(size)
        if full and prediction.confidence != parts[-1][-1].confidence:
            parts.append([])
        parts[-1].append(prediction)
    if len(parts) > 1 and len(parts[-1]) < size / 2:
        parts[-2] += parts.pop()
    return [_bin(part) for part in parts]


def _bin(part: Sequence[Prediction]) -> Bin:
    right = wilson(sum(p.correct for p in part), len(part))
    return Bin(sum(p.confidence for p in part) / len(part), right.rate, (right.lo, right.hi), right.n)


def _by_phase(answers: Sequence[Answered]) -> dict[Phase, Slice]:
    return {phase: slice_of([a for a in answers if a.phase == phase]) for phase in PHASES}


def slice_of(answers: Sequence[Answered]) -> Slice:
    n = len(answers)
    accuracy, interval = _rate(sum(a.correct for a in answers), n)
    cached = sum(a.cached and a.tier is not None for a in answers)
    fresh = {tier: sum(a.tier == tier and not a.cached for a in answers) for tier in TIERS}
    return Slice(
        n=n,
        cost_per_1k_usd=1000.0 * sum(a.cost_usd for a in answers) / n if n else None,
        accuracy=accuracy,
        accuracy_wilson95=interval,
        share_by_tier={tier: count / max(n, 1) for tier, count in fresh.items()},
        share_cached=cached / max(n, 1),
        share_unanswered=sum(a.tier is None for a in answers) / max(n, 1),
    )


def _domain(task: str, answers: Sequence[Answered], trained: Sequence[Trained], learnable: frozenset[str]) -> DomainOutcome:
    own = [a for a in answers if a.task == task]
    after = [a for a in own if a.phase == "after"]
    records = [t for t in trained if t.task == task]
    tested = sum(t.n_test for t in records)
    before_rate, before_interval = _pooled((t.before_correct, t.n_test if t.before_n is None else t.before_n) for t in records)
    after_rate, after_interval = _pooled((t.after_correct, t.n_test) for t in records)
    served = [a for a in after if a.by_student]
    precision, precision_interval = _rate(sum(a.correct for a in served), len(served))
    decision, reason = _decision(records)
    return DomainOutcome(
        n_train=sum(t.n_train for t in records),
        n_test=tested,
        majority=sum(t.majority_correct for t in records) / tested if tested else None,
        before=before_rate,
        after=after_rate,
        wilson95=after_interval,
        decision=decision,
        reason=reason,
        ece=_measured(after, [p for t in records for p in t.predictions]).ece,
        share_by_student=len(served) / max(len(after), 1),
        student_precision=precision,
        before_wilson95=before_interval,
        student_precision_wilson95=precision_interval,
        learnable=task in learnable,
        served=_by_phase(own),
        students=tuple(_student(t, after) for t in records if t.student is not None),
    )


def _decision(records: Sequence[Trained]) -> tuple[Decision, str]:
    """The best decision among a task's students, and every student's reason."""
    if not records:
        return "refused", "nothing was trained: no gap in this traffic was worth a student"
    order: tuple[Decision, ...] = ("promoted", "kept_student", "refused")
    best = min((t.decision for t in records), key=order.index)
    if len(records) == 1:
        return best, records[0].reason
    return best, "; ".join(f"{t.student or 'no student'} ({t.decision}): {t.reason}" for t in records)


def _student(trained: Trained, after: Sequence[Answered]) -> StudentOutcome:
    """`after`: the task's traffic after, by whomever it was answered."""
    tried = [a for a in after if a.student == trained.student]
    served = [a for a in tried if a.by_student]
    rate, interval = _pooled([(trained.after_correct, trained.n_test)])
    precision, precision_interval = _rate(sum(a.correct for a in served), len(served))
    return StudentOutcome(
        name=str(trained.student),
        decision=trained.decision,
        reason=trained.reason,
        n_train=trained.n_train,
        n_test=trained.n_test,
        after=rate,
        wilson95=interval,
        share_answered=len(served) / max(len(after), 1),
        precision=precision,
        precision_wilson95=precision_interval,
        reliability=_measured(tried, trained.predictions),
        ece_held_out=reliability(trained.predictions, "held-out items").ece,
        curve=trained.curve,
    )


def _measured(tried: Sequence[Answered], held_out: Sequence[Prediction]) -> Reliability:
    """Reliability on the traffic after; on held-out items where no student tried any of it."""
    replayed = [Prediction(a.confidence, right) for a in tried if a.confidence is not None and (right := _own(a)) is not None]
    return reliability(replayed, "replayed traffic") if replayed else reliability(held_out, "held-out items")


def _own(answered: Answered) -> bool | None:
    """Whether the student's own answer was right, None where that is not known."""
    if answered.cached:
        return None
    return answered.correct if answered.by_student else answered.student_correct


def training_of(answers: Sequence[Answered], trained: Sequence[Trained], prices: Prices) -> Training:
    seconds = sum(t.core_seconds for t in trained)
    cost = seconds / 3600.0 * prices.cpu_per_core_hour_usd
    before, after = (slice_of([a for a in answers if a.phase == phase]).cost_per_1k_usd for phase in PHASES)
    saved = before - after if before is not None and after is not None else 0.0
    return Training(seconds, cost, math.ceil(1000.0 * cost / saved) if saved >= LEAST_USD else None)


def _pooled(counts: Iterable[tuple[int | None, int]]) -> tuple[float | None, Interval | None]:
    """Share right over all (correct, n) that were measured."""
    measured = [(k, n) for k, n in counts if k is not None]
    return _rate(sum(k for k, _ in measured), sum(n for _, n in measured))


def _rate(k: int, n: int) -> tuple[float | None, Interval | None]:
    if n == 0:
        return None, None
    rate = wilson(k, n)
    return rate.rate, (rate.lo, rate.hi)
