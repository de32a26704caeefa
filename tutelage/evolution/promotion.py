"""Who is promoted, kept, refused, demoted. Two questions kept apart: is a student good enough to serve its domain, and is it better than
the champion it would replace?

Pure rules: evidence in, a verdict with its reason out. They refuse to know how the evidence was measured or what a verdict sets in motion.
The published numbers are floors, each necessary; what convinces is an e-process (`evidence.py`), which may be looked at after every query.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import Field

from tutelage.evolution import discovery
from tutelage.evolution.evidence import Tally, e_value
from tutelage.records import Tier
from tutelage.settings import Strict

Action = Literal["promote", "keep", "refuse", "challenge", "demote", "wait"]
EVEN = 0.5  # the win rate of a candidate that is exactly as good as the champion


class Floors(Strict):
    """What a tier asks for at least: queries judged, mean calibrated confidence, win rate against the teacher."""

    min_queries: int = Field(default=30, ge=1)
    min_confidence: float = Field(default=0.75, ge=0, le=1)
    min_win_rate: float = Field(default=0.60, gt=0, lt=1)


class PromotionSettings(Strict):
    """The ladder (`promotion.yaml`).

    `evidence`: the least e-value of any promotion. `margin`: by how much the win rate of a cheaper candidate may lie below even.
    `cheaper_by`: share of the champion's cost of the same prompts that a candidate must save to be judged by that margin.
    `domain_tolerance`: by how much the share right may fall in any domain. `false_promotions`: the expected share of false ones
    among a year's promotions; half of it is kept for the year's first `half_of_it_for` tests. `approval`: tiers that a person confirms.
    """

    ta: Floors = Floors()
    teacher: Floors = Floors(min_queries=50, min_confidence=0.85, min_win_rate=0.70)
    evidence: float = Field(default=20.0, ge=1)
    margin: float = Field(default=0.05, gt=0, lt=0.5)
    cheaper_by: float = Field(default=0.10, ge=0, lt=1)
    domain_tolerance: float = Field(default=0.02, ge=0, le=1)
    false_promotions: float = Field(default=0.05, gt=0, lt=1)
    half_of_it_for: int = Field(default=20, ge=1)
    approval: tuple[Tier, ...] = ()

    def floors(self, tier: Tier) -> Floors:
        """Raises ValueError for the student tier, which needs no proof."""
        if tier == "student":
            raise ValueError("a student has no floors; ask for those of ta or teacher")
        return self.ta if tier == "ta" else self.teacher

    def needed(self, number: int, passed: int) -> float:
        """The e-value that lets test `number` of the year stand when `passed` others have passed (`discovery.py`)."""
        return discovery.needed(number, passed, alpha=self.false_promotions, half=self.half_of_it_for, least=self.evidence)


@dataclass(frozen=True)
class Cost:
    """What the answers to the prompts of a comparison cost, and how many of them were right."""

    microusd: float = 0.0
    successes: float = 0.0

    @property
    def per_success(self) -> float:
        """Micro-dollars; infinite where something was paid and nothing was right."""
        if self.successes:
            return self.microusd / self.successes
        return float("inf") if self.microusd else 0.0


@dataclass(frozen=True)
class Comparison:
    """A candidate and the champion on the same prompts, as the candidate sees it; `domains` splits `pairs`."""

    pairs: Tally
    domains: Mapping[str, Tally] = field(default_factory=dict)
    candidate: Cost = Cost()
    champion: Cost = Cost()


def compared(pairs: Tally, *, domain: str, price: float, champion_price: float) -> Comparison:
    """A comparison within one domain; prices are micro-dollars of one answer. Which of a tie's two answers was right is not counted:
    half of the ties stand as successes of either."""
    candidate = Cost(price * pairs.n, pairs.wins + 0.5 * pairs.ties)
    champion = Cost(champion_price * pairs.n, pairs.losses + 0.5 * pairs.ties)
    return Comparison(pairs, {domain: pairs}, candidate, champion)


@dataclass(frozen=True)
class Evidence:
    """What is known of a candidate from frozen held-out items it never saw.

    `wins`: answers judged at least as good as the teacher's. `lower`, `upper`: 95 % Wilson bounds of the share right. `majority`: share
    right of always giving the most frequent answer. `comparison`: with who answers the domain now, on the same items; `kept`: the same on
    earlier traffic, its canaries and the champion's own held-out items. `learnable` False: the probe ended the training early, for
    `learnable_reason`. `suspicion`: why the figures cannot be believed (`canaries.py`).
    """

    n: int
    correct: int
    wins: int
    accuracy: float
    lower: float
    upper: float
    majority: float
    confidence: float
    ece: float | None
    learnable: bool
    learnable_reason: str
    before: float | None = None
    comparison: Comparison | None = None
    suspicion: str | None = None
    kept: Mapping[str, Tally] = field(default_factory=dict)

    @property
    def tally(self) -> Tally:
        """The held-out items as wins and losses against the teacher."""
        return Tally(self.wins, 0, self.n - self.wins)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """`promote`: to `tier`. `keep`: stays a student, answering only where its confidence clears the threshold. `refuse`: never answers.
    `challenge`: the champion goes on answering while the candidate earns its evidence, from shadow on (`rollout.py`).
    `demote`: down to `tier`. `wait`: answers nothing before a person approves. `awaits`: the tier that a person must confirm."""

    action: Action
    tier: Tier | None
    reason: str
    awaits: Tier | None = None


@dataclass(frozen=True)
class Finding:
    """The answer to one of the two questions; `e` is the e-value it rests on, `path` by which null."""

    passed: bool
    e: float
    path: Literal["good-enough", "superior", "as-good-and-cheaper", "worse"]
    reason: str


def judge(evidence: Evidence, settings: PromotionSettings, *, needed: float | None = None) -> Verdict:
    """Refuse what learned nothing, what cannot be believed and what is not better than the champion; let the others prove themselves.

    `needed`: the e-value for this test of the year (default: `evidence` of the settings, as if it were the only one).
    """
    bounds = f"95 % [{evidence.lower:.2f}, {evidence.upper:.2f}]"
    held_out = f"{evidence.correct} of {evidence.n} held-out items right ({evidence.accuracy:.2f}, {bounds})"
    if not evidence.learnable:
        return Verdict("refuse", None, f"not learnable: {evidence.learnable_reason}; {held_out}, majority {evidence.majority:.2f}")
    if evidence.n == 0 or evidence.lower <= evidence.majority:
        return Verdict("refuse", None, f"{held_out}: not above always giving the majority answer ({evidence.majority:.2f})")
    if evidence.suspicion is not None:
        return Verdict("refuse", None, f"{held_out}: not believed, {evidence.suspicion}")
    lost = forgotten(evidence.kept, settings)
    if lost:
        return Verdict("refuse", None, f"{held_out}: forgets earlier traffic, {lost}")
    enough = good_enough(evidence.tally, evidence.confidence, settings.ta, needed=needed or settings.evidence)
    tier: Tier = "ta" if enough.passed else "student"
    if evidence.comparison is not None:
        return _against_champion(evidence.comparison, tier, held_out, settings)
    if enough.passed:
        return Verdict("promote", "ta", f"{held_out}, majority {evidence.majority:.2f}; {enough.reason}")
    return Verdict("keep", "student", f"{held_out}, majority {evidence.majority:.2f}; stays a student: {enough.reason}")


def confirmed(verdict: Verdict, approval: Collection[Tier]) -> Verdict:
    """What takes effect of a verdict before a person has approved it: the next lower tier that needs nobody, or nothing at all.

    >>> confirmed(Verdict("promote", "ta", "clears the floors"), ["ta"]).tier
    'student'
    """
    if verdict.tier is None or verdict.tier not in approval:
        return verdict
    lower: list[Tier] = ["ta", "student"] if verdict.tier == "teacher" else ["student"] if verdict.tier == "ta" else []
    granted = next((tier for tier in lower if tier not in approval), None)
    reason = f"{verdict.reason}; a person confirms every {verdict.tier} (promotion.yaml, approval)"
    if granted is None:
        return Verdict("wait", None, reason, verdict.tier)
    action: Action = "keep" if verdict.action == "promote" and granted == "student" else verdict.action
    return Verdict(action, granted, reason, verdict.tier)


def good_enough(wins: Tally, confidence: float, floors: Floors, *, needed: float) -> Finding:
    """Whether a tier's floors are cleared and the wins convince against the floor itself as the null."""
    e = e_value(wins, null=floors.min_win_rate)
    missed = []
    if wins.n < floors.min_queries:
        missed.append(f"{wins.n} judged queries, {floors.min_queries} needed")
    if confidence < floors.min_confidence:
        missed.append(f"calibrated confidence {confidence:.2f} is below {floors.min_confidence:.2f}")
    if wins.rate < floors.min_win_rate:
        missed.append(f"win rate {wins.rate:.2f} is below {floors.min_win_rate:.2f}")
    if e < needed:
        missed.append(f"evidence that the win rate is above {floors.min_win_rate:.2f} is {e:.3g}, {needed:.3g} needed")
    held = f"win rate {wins.rate:.2f} in {wins.n}, calibrated confidence {confidence:.2f} and evidence {e:.3g} clear the floors"
    return Finding(not missed, e, "good-enough", "; ".join(missed) or held)


def better(comparison: Comparison, settings: PromotionSettings, *, needed: float) -> Finding:
    """Whether a candidate may take the champion's place: superior on the same prompts, or as good within the margin and cheaper.

    Either way no domain may be seen to lose more than the tolerance, and a success may not cost more. Those two look at what was
    observed and need no proof: they only ever hold a candidate back.
    """
    pairs = comparison.pairs
    # by what the same prompts cost, not by cost per success: a lucky candidate must not also be given the easier null
    cheaper = comparison.champion.microusd > 0 and comparison.candidate.microusd <= (1 - settings.cheaper_by) * comparison.champion.microusd
    null = EVEN - settings.margin if cheaper else EVEN
    path: Literal["superior", "as-good-and-cheaper"] = "as-good-and-cheaper" if cheaper else "superior"
    e = e_value(pairs, null=null)
    seen = f"win rate {pairs.rate:.2f} against the champion in {pairs.n} pairs, evidence {e:.3g} that it is above {null:.2f}"
    held_back = _held_back(comparison, settings)
    if pairs.n < settings.ta.min_queries:
        held_back.append(f"{settings.ta.min_queries} pairs needed")
    if e < needed:
        held_back.append(f"evidence of {needed:.3g} needed")
    return Finding(not held_back, e, path, "; ".join([seen, *held_back]))


def forgotten(kept: Mapping[str, Tally], settings: PromotionSettings) -> str:
    """What a candidate knows less of than who answers now, by where the items are from; empty where it is nothing. What was observed needs
    no proof here: it only ever holds a candidate back."""
    lost = {name: pairs for name, pairs in kept.items() if pairs.n >= settings.ta.min_queries and pairs.lead < -settings.domain_tolerance}
    told = [f"{-pairs.lead:.1%} of {pairs.n} {name} lost against the champion" for name, pairs in sorted(lost.items())]
    return "; ".join([*told, f"{settings.domain_tolerance:.0%} allowed"]) if told else ""


def worse(comparison: Comparison, settings: PromotionSettings) -> Finding:
    """Whether the same kind of evidence says that the candidate is worse than the champion: it is tried no longer."""
    e = e_value(comparison.pairs.reversed(), null=EVEN)
    reason = f"win rate {comparison.pairs.rate:.2f} against the champion in {comparison.pairs.n} pairs, evidence {e:.3g} that it is worse"
    return Finding(e >= settings.evidence, e, "worse", reason)


def demote(tier: Tier, wins: Tally, settings: PromotionSettings) -> Verdict:
    """Whether a version loses its tier: evidence, of the strength that promotes, that its win rate is below its tier's floor."""
    if tier == "student":
        return Verdict("keep", tier, "a student has no tier to lose")
    floor = settings.floors(tier).min_win_rate
    e = e_value(wins.reversed(), null=1 - floor)
    seen = f"win rate {wins.rate:.2f} in {wins.n} since it became {tier}, evidence {e:.3g} that it is below {floor:.2f}"
    if e < settings.evidence:
        return Verdict("keep", tier, seen)
    return Verdict("demote", "ta" if tier == "teacher" else "student", seen)


def _against_champion(comparison: Comparison, tier: Tier, held_out: str, settings: PromotionSettings) -> Verdict:
    harmful = worse(comparison, settings)
    finding = better(comparison, settings, needed=settings.evidence)
    if harmful.passed or (finding.path == "superior" and comparison.pairs.n and comparison.pairs.lead <= 0):
        return Verdict("refuse", None, f"{held_out}: not better than the champion it would replace: {finding.reason}")
    return Verdict("challenge", tier, f"{held_out}: challenges the champion: {finding.reason}")


def _held_back(comparison: Comparison, settings: PromotionSettings) -> list[str]:
    told = []
    for name, pairs in sorted(comparison.domains.items()):
        if pairs.n >= settings.ta.min_queries and pairs.lead < -settings.domain_tolerance:
            told.append(f"domain {name} loses {-pairs.lead:.1%} in {pairs.n} pairs, {settings.domain_tolerance:.0%} allowed")
    candidate, champion = comparison.candidate.per_success, comparison.champion.per_success
    if candidate > champion:
        told.append(f"a success costs ${candidate / 1e6:.6f}, the champion's ${champion / 1e6:.6f}")
    return told
