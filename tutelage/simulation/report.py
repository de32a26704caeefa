"""`tutelage simulate`: every question, one report, beside what was promised.

It refuses to judge: the rules are `tutelage.evolution`'s, the truth is the simulation's, and here both are only counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tutelage.evolution.promotion import PromotionSettings
from tutelage.evolution.rollout import RolloutSettings
from tutelage.evolution.watch import WatchSettings
from tutelage.scoring import wilson
from tutelage.simulation import fleet, trials
from tutelage.simulation.trials import Trial

HORIZON = 2_000  # queries that a student is looked at where nobody should ever be promoted
GATE_HORIZON = 500  # queries that the published gate is looked at
CHAMPIONS, MOST_OUTCOMES = 100, 100_000  # that are as good as ever, to count false rollbacks; outcomes of each, at most
OUTCOMES_A_RUN = 100
RUNS_A_YEAR = 40  # one year of a fleet for so many runs

Say = Callable[[str], None]


@dataclass(frozen=True)
class Rules:
    """The production settings that are put to the test."""

    promotion: PromotionSettings
    rollout: RolloutSettings
    watch: WatchSettings


@dataclass(frozen=True)
class Measured:
    """The report, and the single runs behind it for the plot."""

    report: dict[str, Any]
    trials: dict[str, Trial]


def years_of(runs: int) -> int:
    return max(5, runs // RUNS_A_YEAR)


def _outcomes(runs: int) -> int:
    return min(OUTCOMES_A_RUN * runs, MOST_OUTCOMES)


def steps(runs: int) -> int:
    """How often `measure` says where it is."""
    return len(_questions(runs, Rules(PromotionSettings(), RolloutSettings(), WatchSettings()))) + 2 + years_of(runs)


def measure(seed: int, runs: int, rules: Rules, say: Say) -> Measured:
    """Run everything; the same seed, runs and settings give the same figures."""
    import numpy as np

    started = time.perf_counter()
    done: dict[str, Trial] = {}
    for number, (name, question) in enumerate(_questions(runs, rules).items()):
        done[name] = question(np.random.default_rng([seed, number]))
        say(name.replace("_", " "))
    false_alarms = trials.false_rollbacks(np.random.default_rng([seed, 100]), CHAMPIONS, _outcomes(runs), rules.watch)
    say("false rollbacks")
    refused = {
        "constant_answer": trials.refused(np.random.default_rng([seed, 101]), min(runs, 200), rules.promotion, kind="constant_answer"),
        "contaminated": trials.refused(np.random.default_rng([seed, 102]), min(runs, 200), rules.promotion, kind="contaminated"),
    }
    say("students that cheat")
    years = []
    for number in range(years_of(runs)):
        years.append(fleet.year(np.random.default_rng([seed, 1000 + number]), rules.promotion, rules.rollout))
        say(f"year {number + 1} of a fleet")
    report = _report(seed, runs, done, false_alarms, refused, years)
    report["settings"] = {
        "promotion": rules.promotion.model_dump(),
        "rollout": rules.rollout.model_dump(),
        "watch": rules.watch.model_dump(),
    }
    report["wall_seconds"] = round(time.perf_counter() - started, 1)
    return Measured(report, done)


def _questions(runs: int, rules: Rules) -> dict[str, Callable[[Any], Trial]]:
    ladder, floor = rules.promotion, rules.promotion.ta.min_win_rate
    return {
        "superiority_equal": lambda rng: trials.superior(rng, runs, HORIZON, ladder, rate=0.5),
        "superiority_equal_with_ties": lambda rng: trials.superior(rng, runs, HORIZON, ladder, rate=0.5, ties=0.3),
        "superiority_worse": lambda rng: trials.superior(rng, runs, HORIZON, ladder, rate=0.45),
        "noninferiority_at_margin": lambda rng: trials.as_good_and_cheaper(rng, runs, HORIZON, ladder, rate=0.5 - ladder.margin),
        "good_enough_at_floor": lambda rng: trials.enough(rng, runs, HORIZON, ladder, rate=floor),
        "0.60": lambda rng: trials.superior(rng, runs, HORIZON, ladder, rate=0.60),
        "0.70": lambda rng: trials.superior(rng, runs, HORIZON, ladder, rate=0.70),
        "good_enough_plus_0.20": lambda rng: trials.enough(rng, runs, HORIZON, ladder, rate=floor + 0.20),
        "published_gate": lambda rng: trials.published_gate(rng, runs, GATE_HORIZON, ladder),
        "rollback_15": lambda rng: trials.rolled_back(rng, runs, rules.watch, loss=0.15),
        "rollback_30": lambda rng: trials.rolled_back(rng, runs, rules.watch, loss=0.30),
    }


def _report(
    seed: int, runs: int, done: dict[str, Trial], false_alarms: float, refused: dict[str, bool], years: list[fleet.Year]
) -> dict[str, Any]:
    nulls = ("superiority_equal", "superiority_worse", "noninferiority_at_margin", "good_enough_at_floor", "superiority_equal_with_ties")
    waited = sorted(queries for year in years for queries in year.queries)
    return {
        "seed": seed,
        "runs": runs,
        "false_promotion_rate": {name: done[name].share for name in nulls} | {"fleet_year": _mean([year.false_share for year in years])},
        "false_promotion_wilson95": {name: _interval(done[name]) for name in nulls},
        "median_queries_to_promote": {name: done[name].median for name in ("0.60", "0.70", "good_enough_plus_0.20")},
        "control_published_gate": {"equal_peeked_to_500": done["published_gate"].share, "wilson95": _interval(done["published_gate"])},
        "rollback": {
            "median_outcomes_15": done["rollback_15"].median,
            "median_outcomes_30": done["rollback_30"].median,
            "false_per_100k": false_alarms,
            "outcomes_watched": CHAMPIONS * _outcomes(runs),
        },
        "refused": refused,
        "fleet": {
            "years": len(years),
            "students_a_year": fleet.STUDENTS,
            "promoted_a_year": _mean([year.promoted for year in years]),
            "false_a_year": _mean([year.false for year in years]),
            "deserving_promoted": sum(y.promoted - y.false for y in years) / max(sum(y.deserving for y in years), 1),
            "median_live_queries_of_deserving": waited[len(waited) // 2] if waited else None,
        },
    }


def _interval(trial: Trial) -> list[float]:
    share = wilson(sum(after is not None for after in trial.promoted), len(trial.promoted))
    return [share.lo, share.hi]


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)
