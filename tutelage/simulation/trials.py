"""The questions asked of the engine, each answered by its production rules on drawn outcomes.

It refuses to hold a rule of its own, but for one control: the published gate, which is what the rules replace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tutelage.evolution.canaries import inflated
from tutelage.evolution.evidence import Tally
from tutelage.evolution.promotion import EVEN, Comparison, Evidence, PromotionSettings, better, compared, good_enough, judge
from tutelage.evolution.watch import Detector, WatchSettings, follow
from tutelage.scoring import wilson
from tutelage.simulation.paths import Paths, draw, looks

ACCEPTANCE = 0.90  # of the champion whose losses are to be noticed, in its frozen baseline
PRICE = 100.0  # micro-dollars of a champion's answer
CONFIDENCE = 0.90  # mean calibrated confidence: no floor but the win rate shall decide
HELD_OUT, FRESH = 110, 40  # items that judge a student, and of these the ones rotated in after it was trained

Side = Literal["same-cost", "cheaper"]
Asked = Callable[[Tally], bool]


@dataclass(frozen=True)
class Trial:
    """After how many queries each run was promoted; None: not within the horizon."""

    promoted: tuple[int | None, ...]
    horizon: int

    @property
    def share(self) -> float:
        return sum(after is not None for after in self.promoted) / len(self.promoted)

    @property
    def median(self) -> float | None:
        """Queries until half of all runs were promoted; None when fewer were."""
        done = sorted(self.horizon + 1 if after is None else after for after in self.promoted)
        middle = done[len(done) // 2]
        return middle if middle <= self.horizon else None


def compare(pairs: Tally, side: Side) -> Comparison:
    """A comparison as production makes it, of a candidate at the champion's price or at half of it."""
    return compared(pairs, domain="simulated", price=PRICE if side == "same-cost" else PRICE / 2, champion_price=PRICE)


def superior(rng: Any, runs: int, queries: int, settings: PromotionSettings, *, rate: float, ties: float = 0.0) -> Trial:
    """Candidates of the champion's price with a true paired win rate of `rate`, looked at after every query."""

    def asked(pairs: Tally) -> bool:
        return better(compare(pairs, "same-cost"), settings, needed=settings.evidence).passed

    return _first(draw(rng, runs, queries, rate=rate, ties=ties), asked, null=EVEN, needed=settings.evidence)


def as_good_and_cheaper(rng: Any, runs: int, queries: int, settings: PromotionSettings, *, rate: float) -> Trial:
    """Candidates at half the champion's price, judged by non-inferiority."""

    def asked(pairs: Tally) -> bool:
        return better(compare(pairs, "cheaper"), settings, needed=settings.evidence).passed

    return _first(draw(rng, runs, queries, rate=rate), asked, null=EVEN - settings.margin, needed=settings.evidence)


def enough(rng: Any, runs: int, queries: int, settings: PromotionSettings, *, rate: float) -> Trial:
    """Students of a domain nobody answers yet, against the floors of a TA."""

    def asked(wins: Tally) -> bool:
        return good_enough(wins, CONFIDENCE, settings.ta, needed=settings.evidence).passed

    null = settings.ta.min_win_rate
    return _first(draw(rng, runs, queries, rate=rate), asked, null=null, needed=settings.evidence)


def published_gate(rng: Any, runs: int, queries: int, settings: PromotionSettings) -> Trial:
    """The control: the floors alone, checked after every query, on a student exactly as good as the one it is compared with."""
    import numpy as np

    paths = draw(rng, runs, queries, rate=EVEN)
    count = np.arange(1, queries + 1)
    cleared = (paths.wins / count >= settings.ta.min_win_rate) & (count >= settings.ta.min_queries)
    return Trial(tuple(int(row.argmax()) + 1 if row.any() else None for row in cleared), queries)


def rolled_back(rng: Any, runs: int, settings: WatchSettings, *, loss: float, most: int = 5_000) -> Trial:
    """Champions that lose `loss` of their acceptance: verified outcomes from the loss on until the watch says so.

    The watch begins with the loss: any outcome before it would only have made it quicker.
    """
    detector = settings.detector("acceptance", ACCEPTANCE)
    found: list[int | None] = []
    for _ in range(runs):
        good = (rng.random(most) < ACCEPTANCE - loss).tolist()
        watched = follow("acceptance", detector, good)
        found.append(watched.seen if watched.alarm else None)
    return Trial(tuple(found), most)


def false_rollbacks(rng: Any, champions: int, outcomes: int, settings: WatchSettings) -> float:
    """False alarms in 100,000 outcomes of champions that are as good as ever; each is watched anew after one."""
    import numpy as np

    detector: Detector = settings.detector("acceptance", ACCEPTANCE)
    state = np.tile(np.asarray(detector.start()), (champions, 1))
    alarms = 0
    for _ in range(outcomes):
        state = detector.after(state, rng.random(champions) < ACCEPTANCE)
        alarmed = detector.value(state) >= detector.limit
        if alarmed.any():
            alarms += int(alarmed.sum())
            state[alarmed] = detector.start()
    return alarms * 100_000 / (champions * outcomes)


def held_out(right: int, *, fresh_right: int, majority: float, n: int = HELD_OUT) -> Evidence:
    """A student's evidence as the gate reads it: `right` of `n` held-out items, `fresh_right` of the ones it cannot have seen."""
    share = wilson(right, n)
    doubt = inflated(Tally(right, 0, n - right), Tally(fresh_right, 0, FRESH - fresh_right))
    return Evidence(
        n=n, correct=right, wins=right, accuracy=share.rate, lower=share.lo, upper=share.hi, majority=majority, confidence=CONFIDENCE,
        ece=None, learnable=True, learnable_reason="simulated", suspicion=doubt.reason if doubt.alarm else None,
    )  # fmt: skip


def refused(rng: Any, runs: int, settings: PromotionSettings, *, kind: Literal["constant_answer", "contaminated"]) -> bool:
    """Whether the gate refused every such student: one that always says the most frequent answer (right more often than the floor
    asks), one that learned the evaluation set by heart (and is right on fresh items as often as the floor asks)."""
    common = settings.ta.min_win_rate + 0.1
    for _ in range(runs):
        if kind == "constant_answer":
            right = int(rng.binomial(HELD_OUT, common))
            evidence = held_out(right, fresh_right=int(rng.binomial(FRESH, common)), majority=right / HELD_OUT)
        else:
            evidence = held_out(HELD_OUT, fresh_right=int(rng.binomial(FRESH, settings.ta.min_win_rate)), majority=0.1)
        if judge(evidence, settings).action != "refuse":
            return False
    return True


def _first(paths: Paths, asked: Asked, *, null: float, needed: float) -> Trial:
    """The first look at which the rule says yes. Where its e-value is too low it cannot, so it is asked only at the others."""
    found: Sequence[int | None] = [
        next((int(look) for look in able if asked(paths.tally(run, int(look)))), None)
        for run, able in enumerate(looks(paths, null=null, needed=needed))
    ]
    return Trial(tuple(found), paths.queries)
