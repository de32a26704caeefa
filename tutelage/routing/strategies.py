"""How a request may be answered: six strategies, each a small class that turns what is known before the call into a plan.

Pure rules: values in, a frozen plan with its reason out. They refuse to know HTTP, how a model is called, and what a tenant pays for.
To add one: a class with a `name` and a `plan`, a line in STRATEGIES, and its name in `records.Strategy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

from tutelage.records import Strategy, Tier
from tutelage.routing.estimates import Estimate
from tutelage.routing.policy import Policy, StudentSnapshot, choose_student
from tutelage.routing.signs import MAX_SCORE

Shape = Literal["always-teacher", "cascade", "direct", "parallel"]
BASIC: frozenset[Strategy] = frozenset({"always-teacher", "cascade", "quality"})
TEACHERS_WORTH = 1.0  # until outcomes say otherwise: the teacher is what quality is measured against
_RANK: Mapping[Tier, int] = {"student": 0, "ta": 1, "teacher": 2}


@dataclass(frozen=True)
class Candidate:
    """A model that may answer. `microusd`: what one answer of the expected length costs, in millionths of a US dollar. `estimate`: how
    probably its answer is acceptable, before it is asked; None where nobody estimates. Only a student is judged after the call.
    `recalled`: it is given earlier answers in context, of which the most similar one surely is right so often; 0: it is given none."""

    name: str
    tier: Tier
    microusd: int
    estimate: Estimate | None = None
    student: StudentSnapshot | None = None
    recalled: float = 0.0

    @property
    def known(self) -> float | None:
        """The estimated probability; None while it is unknown."""
        return None if self.estimate is None or self.estimate.kind == "unknown" else self.estimate.probability

    @property
    def worth(self) -> float:
        known = self.known
        return known if known is not None else TEACHERS_WORTH if self.tier == "teacher" else 0.0

    @property
    def assured(self) -> float:
        """The mean worth that its answers to requests like this one surely have; 0 while that is unknown. With the right answer before its
        eyes it is taken for as good as that, unless outcomes say otherwise."""
        if self.known is None or self.estimate is None:
            return self.recalled
        return max(self.estimate.assured, self.recalled if self.known >= self.recalled else 0.0)


@dataclass(frozen=True)
class Situation:
    """What is known of a request before anybody is asked. `models`: those configured that may answer it, as they are preferred.
    `students`: of its domain. `similarity` is to the nearest domain; None: not looked at. `least`: the confidence asked for.
    `promised`: the quality that the client states as its minimum, which answers must surely have; None: it states none."""

    domain: str | None
    similarity: float | None
    models: tuple[Candidate, ...]
    students: tuple[Candidate, ...]
    policy: Policy
    least: float
    max_microusd: int | None = None
    most_parallel: int = 3
    promised: float | None = None

    @property
    def teacher(self) -> Candidate | None:
        return next((model for model in self.models if model.tier == "teacher"), None)


@dataclass(frozen=True)
class Step:
    """Ask one model. `least`: the confidence its answer must reach to be given; None: it is given as it is. `most_microusd`: what it may
    cost; None: whatever it costs. `promised`: the quality that answers as sure as its own must surely have."""

    candidate: Candidate
    least: float | None = None
    most_microusd: int | None = None
    promised: float | None = None


@dataclass(frozen=True)
class Plan:
    """Who is asked in turn (`parallel`: all at once), and why. Without steps nobody may answer. `others`: models that exploration may ask
    in place of the last one."""

    strategy: Strategy
    shape: Shape
    steps: tuple[Step, ...]
    reason: str
    others: tuple[Candidate, ...] = ()
    explored: bool = False
    propensity: float = 1.0  # of the last step's model being the one drawn

    @property
    def microusd(self) -> int:
        """What it costs when everybody has to be asked."""
        return sum(step.candidate.microusd for step in self.steps)


class Planner(Protocol):
    name: ClassVar[Strategy]

    def plan(self, situation: Situation) -> Plan: ...


class AlwaysTeacher:
    """The teacher, whatever a student could do."""

    name: ClassVar[Strategy] = "always-teacher"

    def plan(self, situation: Situation) -> Plan:
        return _ending(self.name, (), situation.teacher, "the teacher was asked for by strategy")


class Cascade:
    """Student, then TA, then teacher: each answer is given if its calibrated confidence reaches what is asked."""

    name: ClassVar[Strategy] = "cascade"

    def plan(self, situation: Situation) -> Plan:
        stops, reason = _stops(situation)
        return _ending(self.name, stops, situation.teacher, reason)


class Direct:
    """The best performer for a query like those that are known; the others are not asked."""

    name: ClassVar[Strategy] = "direct"

    def plan(self, situation: Situation) -> Plan:
        everybody = [*situation.models, *situation.students]
        known = [candidate for candidate in everybody if candidate.known is not None]
        near = situation.similarity is not None and situation.similarity >= situation.policy.similarity
        best = max(known, key=lambda c: (c.worth, -c.microusd, c.name), default=None)
        if best is None or not near or best.worth < situation.least or not _kept(best, situation):
            return _instead(self.name, situation, "no query like it is known well enough" if best is None or not near else _short(best))
        others = tuple(candidate for candidate in situation.models if candidate != best and _explorable(candidate, situation))
        step = Step(best, promised=situation.promised if best.student is not None else None)
        return Plan(self.name, "direct", (step,), f"{best.name} does best at queries like it ({best.worth:.3f})", others)


class Parallel:
    """Several at once where the query is like nothing known, and the answer that most of them agree on; known ones as `quality`."""

    name: ClassVar[Strategy] = "parallel"

    def plan(self, situation: Situation) -> Plan:
        if situation.promised is not None:
            return _instead(self.name, situation, "agreement promises no quality")
        asked = sorted(situation.models, key=lambda c: (-c.worth, c.microusd))[: situation.most_parallel]
        if situation.domain is not None or len(asked) < 2:
            return _instead(self.name, situation, "the query is no novel one" if situation.domain is not None else "there is but one model")
        names = ", ".join(candidate.name for candidate in asked)
        return Plan(self.name, "parallel", tuple(map(Step, asked)), f"the query is a novel one: {names} are asked at once")


class Budget:
    """The best answer that costs no more than may be spent; a student tries first where both fit."""

    name: ClassVar[Strategy] = "budget"

    def plan(self, situation: Situation) -> Plan:
        if situation.max_microusd is None:
            return _instead(self.name, situation, "no maximum cost was given")
        most = situation.max_microusd
        stops, reason = _stops(situation)
        within = [model for model in situation.models if model.microusd <= most]
        if not within:
            return self._cheapest(situation, most)
        last = max(within, key=lambda c: (c.worth, -c.microusd, c.name))
        fitting = _fitting(stops, most - last.microusd)
        left = most - sum(step.candidate.microusd for step in fitting)
        steps = (*fitting, Step(last, most_microusd=left))
        shape: Shape = "cascade" if fitting else "always-teacher" if last.tier == "teacher" else "direct"
        why = reason if fitting else f"{last.name} is the best"
        others = () if fitting else tuple(c for c in within if c != last and _explorable(c, situation))
        return Plan(self.name, shape, steps, f"{why} within {most} micro-dollars", others)

    def _cheapest(self, situation: Situation, most: int) -> Plan:
        """No configured model fits: a student that does answers as it is, or nobody."""
        able = [student for student in situation.students if _ceiling(student) >= situation.least and _kept(student, situation)]
        fitting = [student for student in able if student.microusd <= most]
        if fitting:
            best = max(fitting, key=lambda c: (_RANK[c.tier], -c.microusd, c.name))
            return Plan(self.name, "direct", (Step(best, most_microusd=most),), f"only {best.name} costs at most {most} micro-dollars")
        costs = min((c.microusd for c in (*situation.models, *situation.students)), default=0)
        told = f"{most} micro-dollars are less than the {costs} that the cheapest model here is likely to take"
        return Plan(self.name, "direct", (), told)


class Quality:
    """At least the quality that is asked, as cheaply as it goes: students whose answers are judged, and behind them the cheapest model
    whose answers to such requests surely are good enough, the teacher where none is known to be. What a client states as its minimum is
    promised of students too: a probability alone is not enough for it."""

    name: ClassVar[Strategy] = "quality"

    def plan(self, situation: Situation) -> Plan:
        stops, reason = _stops(situation)
        teacher = situation.teacher
        enough = [c for c in situation.models if c.assured >= situation.least and _cheaper(c, teacher)]
        last = min(enough, key=lambda c: (c.microusd, -c.worth, c.name), default=teacher)
        if last is not teacher and last is not None:
            behind = f"{last.name} is the cheapest that surely is good enough ({last.assured:.3f} reaches {situation.least:.3f})"
            behind += ", with earlier answers in context" if last.recalled else ""
            reason = f"{reason}; {behind}" if stops else behind
        others = tuple(c for c in situation.models if c != last and _explorable(c, situation))
        return _ending(self.name, stops, last, reason, () if stops else others)


STRATEGIES: Mapping[Strategy, Planner] = {
    strategy.name: strategy for strategy in (AlwaysTeacher(), Direct(), Cascade(), Parallel(), Budget(), Quality())
}


def plan(strategy: Strategy, situation: Situation) -> Plan:
    """What a strategy makes of a situation; where it would cost more than may be spent, the best that does not."""
    found = STRATEGIES[strategy].plan(situation)
    if situation.max_microusd is None or strategy == "budget":
        return found
    if found.microusd <= situation.max_microusd:
        left = situation.max_microusd - sum(step.candidate.microusd for step in found.steps[:-1])
        return replace(found, steps=tuple(_capped(found, left)))
    return replace(STRATEGIES["budget"].plan(situation), strategy=strategy)


def _capped(found: Plan, left: int) -> Sequence[Step]:
    if found.shape == "parallel":  # what is left over is nobody's: all are asked at once
        return [replace(step, most_microusd=step.candidate.microusd) for step in found.steps]
    return [*found.steps[:-1], *(replace(step, most_microusd=left) for step in found.steps[-1:])]


def _stops(situation: Situation) -> tuple[tuple[Step, ...], str]:
    """Students of the domain that could ever be sure enough, the lowest tier first, and why."""
    snapshots = [c.student for c in situation.students if c.student is not None]
    choice = choose_student(situation.domain, snapshots, quality_floor=situation.least)
    able = [c for c in situation.students if _ceiling(c) >= situation.least and _kept(c, situation)]
    best: dict[Tier, Candidate] = {}
    for candidate in sorted(able, key=lambda c: (c.student.version if c.student else 0, c.name)):
        best[candidate.tier] = candidate
    ordered = sorted(best.values(), key=lambda c: _RANK[c.tier])
    if choice.student is not None and not ordered:
        return (), f"no student's answers surely are as good as the {situation.promised} that is promised"
    stops = (Step(c, max(situation.least, c.student.threshold if c.student else 0.0), promised=situation.promised) for c in ordered)
    return tuple(stops), choice.reason


def _kept(candidate: Candidate, situation: Situation) -> bool:
    """Whether it can keep what is promised; the teacher is what quality is measured against."""
    if situation.promised is None:
        return True
    if candidate.student is not None:
        return candidate.student.calibrator.assured(MAX_SCORE) >= situation.promised
    return candidate.tier == "teacher" or candidate.assured >= situation.promised


def _ceiling(candidate: Candidate) -> float:
    """The highest confidence that a student's answer can have, 0 where it could never reach its own threshold."""
    student = candidate.student
    if student is None:
        return 0.0
    highest = student.calibrator.probability(MAX_SCORE)
    return highest if highest >= student.threshold else 0.0


def _fitting(stops: Sequence[Step], left: int) -> tuple[Step, ...]:
    """The highest tiers that may be tried for what is left."""
    fitting: list[Step] = []
    for step in reversed(stops):
        if step.candidate.microusd <= left:
            fitting.insert(0, step)
            left -= step.candidate.microusd
    return tuple(fitting)


def _ending(strategy: Strategy, stops: tuple[Step, ...], last: Candidate | None, reason: str, others: tuple[Candidate, ...] = ()) -> Plan:
    steps = stops if last is None else (*stops, Step(last))
    shape: Shape = "cascade" if stops else "always-teacher" if last is None or last.tier == "teacher" else "direct"
    return Plan(strategy, shape, steps, reason, others)


def _instead(strategy: Strategy, situation: Situation, why: str) -> Plan:
    found = STRATEGIES["quality"].plan(situation)
    return replace(found, strategy=strategy, reason=f"{why}, so as quality: {found.reason}")


def _short(best: Candidate) -> str:
    return f"the best at queries like it, {best.name}, is not good enough ({best.worth:.3f})"


def _cheaper(candidate: Candidate, teacher: Candidate | None) -> bool:
    return teacher is None or candidate == teacher or candidate.microusd < teacher.microusd


def _explorable(candidate: Candidate, situation: Situation) -> bool:
    """Models that are meant to take over from the teacher, the teacher itself, and whatever outcomes are known of."""
    return candidate.tier != "teacher" or candidate == situation.teacher or candidate.known is not None
