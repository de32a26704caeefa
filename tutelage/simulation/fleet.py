"""A year of students with known truth, each judged and rolled out by the production rules: how many of those promoted should not have been?

It refuses to hold a rule: what is decided, and at which evidence, is `tutelage.evolution`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tutelage.evolution.canaries import inflated
from tutelage.evolution.evidence import Tally
from tutelage.evolution.promotion import EVEN, PromotionSettings, good_enough, judge
from tutelage.evolution.rollout import Rollout, RolloutSettings, step
from tutelage.simulation.paths import HAIR, Paths, draw
from tutelage.simulation.trials import CONFIDENCE, FRESH, HELD_OUT, Side, compare, held_out

STUDENTS = 200  # of a year
QUERIES = 600  # verified outcomes that a student gets to show what it can

Kind = Literal["better", "equal", "worse", "reward-hacked", "contaminated"]
KINDS: tuple[Kind, ...] = ("better", "equal", "equal", "worse", "reward-hacked", "contaminated")  # drawn evenly; equal ones are many


@dataclass(frozen=True)
class Truth:
    """A student as only the simulation knows it. `rate`: true win rate, against the teacher or, of a challenger, the champion;
    `shown`: the win rate where it could cheat (leaked items, a pleased judge). `deserves`: promoting it would be right."""

    kind: Kind
    rate: float
    shown: float
    side: Side
    challenger: bool
    deserves: bool


@dataclass(frozen=True)
class Year:
    """How a year went: who was promoted, rightly or not, and after how many live outcomes a rightful one was."""

    promoted: int
    false: int
    deserving: int
    queries: tuple[int, ...]
    false_kinds: tuple[Kind, ...]

    @property
    def false_share(self) -> float:
        return self.false / self.promoted if self.promoted else 0.0


def year(rng: Any, settings: PromotionSettings, rollout: RolloutSettings, *, students: int = STUDENTS) -> Year:
    """Students one after another, each a test of the year; later ones profit from those that passed (e-LOND)."""
    passed = false = deserving = 0
    queries: list[int] = []
    kinds: list[Kind] = []
    for number in range(1, students + 1):
        truth = _student(rng, settings)
        needed = settings.needed(number, passed)
        after = _challenge(rng, truth, settings, rollout, needed) if truth.challenger else _first_of_domain(rng, truth, settings, needed)
        deserving += truth.deserves
        if after is None:
            continue
        passed += 1
        if truth.deserves:
            queries.append(after)
        else:
            false += 1
            kinds.append(truth.kind)
    return Year(passed, false, deserving, tuple(queries), tuple(kinds))


def _student(rng: Any, settings: PromotionSettings) -> Truth:
    kind = KINDS[int(rng.integers(len(KINDS)))]
    challenger = bool(rng.random() < 0.5)
    side: Side = "cheaper" if rng.random() < 0.5 else "same-cost"
    null = (EVEN - settings.margin if side == "cheaper" else EVEN) if challenger else settings.ta.min_win_rate
    rate = {
        "better": null + rng.uniform(0.08, 0.3),
        "equal": null,
        "worse": null - rng.uniform(0.02, 0.2),
        "reward-hacked": null - rng.uniform(0.1, 0.2),
        "contaminated": null - rng.uniform(0.0, 0.2),
    }[kind]
    shown = {"reward-hacked": 0.9, "contaminated": 1.0}.get(kind, rate)
    return Truth(kind, rate, shown, side, challenger, kind == "better")


def _first_of_domain(rng: Any, truth: Truth, settings: PromotionSettings, needed: float) -> int | None:
    """The gate on held-out items, then live outcomes added to them until the evidence is there; live outcomes needed, None: never."""
    right = int(rng.binomial(HELD_OUT, truth.shown))
    evidence = held_out(right, fresh_right=int(rng.binomial(FRESH, truth.rate)), majority=0.1)
    verdict = judge(evidence, settings, needed=needed)
    if verdict.action != "keep":
        return 0 if verdict.action == "promote" else None
    paths = draw(rng, 1, QUERIES, rate=truth.rate)
    able = paths.log_e(0, null=settings.ta.min_win_rate, with_=evidence.tally) >= math.log(needed) - HAIR
    for look in range(1, QUERIES + 1):
        live = paths.tally(0, look)
        if look % FRESH == 0 and inflated(evidence.tally, live).alarm:
            return None
        if able[look - 1] and good_enough(evidence.tally + live, CONFIDENCE, settings.ta, needed=needed).passed:
            return look
    return None


def _challenge(rng: Any, truth: Truth, settings: PromotionSettings, rollout: RolloutSettings, needed: float) -> int | None:
    """From shadow to the champion's place; live pairs needed, None: stopped, or not there within the year.

    What it shows where it could cheat is no evidence here: pairs are of prompts it was not trained on, judged by verified outcomes.
    """
    import numpy as np

    paths = draw(rng, 1, QUERIES, rate=truth.rate)
    percent, since, look = 0, 0, 0
    while look < QUERIES:
        last = percent == rollout.stages[-2]
        able = _able(paths, since, settings, truth.side, needed=needed if last else settings.evidence)
        moved = False
        for look in (np.flatnonzero(able) + since + 1).tolist():
            pairs, before = paths.tally(0, look), paths.tally(0, since) if since else Tally()
            here = Tally(pairs.wins - before.wins, pairs.ties - before.ties, pairs.losses - before.losses)
            taken = step(Rollout(percent, compare(pairs, truth.side), here), rollout, settings, needed=needed)
            if taken.action in ("promote", "stop"):
                return look if taken.action == "promote" else None
            if taken.action == "advance":
                percent, since, moved = taken.percent, look, True
                break
        if not moved:
            return None
    return None


def _able(paths: Paths, since: int, settings: PromotionSettings, side: Side, *, needed: float) -> Any:
    """For each look of a stage whether the evidence is high enough, for or against, that the rule could move the rollout."""
    null = EVEN - settings.margin if side == "cheaper" else EVEN
    forward = paths.log_e(0, null=null)[since:] >= math.log(needed) - HAIR
    worse = paths.log_e(0, null=EVEN, reversed_=True)[since:] >= math.log(settings.evidence) - HAIR
    here = paths.log_e(0, null=EVEN, since=since, reversed_=True) >= math.log(settings.evidence) - HAIR
    return forward | worse | here
