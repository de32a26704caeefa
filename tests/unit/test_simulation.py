"""The simulation measures the production rules: what the report says changes when a rule does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tutelage.cli import main
from tutelage.evolution.evidence import Tally
from tutelage.evolution.promotion import EVEN, PromotionSettings, better
from tutelage.evolution.rollout import RolloutSettings
from tutelage.evolution.watch import WatchSettings
from tutelage.settings import CHECKOUT
from tutelage.simulation import fleet, trials
from tutelage.simulation.paths import draw, looks

LADDER, STAGES, WATCH = PromotionSettings(), RolloutSettings(), WatchSettings()
RUNS = 150


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_asking_only_where_the_evidence_allows_it_finds_what_asking_after_every_query_finds() -> None:
    paths = draw(rng(), 30, 200, rate=0.62)

    for run, able in enumerate(looks(paths, null=EVEN, needed=LADDER.evidence)):
        for look in range(1, 201):
            asked = better(trials.compare(paths.tally(run, look), "same-cost"), LADDER, needed=LADDER.evidence)
            assert look in able or not asked.passed


def test_paths_have_the_rate_and_the_ties_they_were_asked_for() -> None:
    paths = draw(rng(), 200, 500, rate=0.6, ties=0.3)
    together = sum((paths.tally(run, 500) for run in range(200)), Tally())

    assert together.rate == pytest.approx(0.6, abs=0.01)
    assert together.ties / together.n == pytest.approx(0.3, abs=0.01)


def test_equal_students_are_promoted_seldom_and_better_ones_soon() -> None:
    equal = trials.superior(rng(1), RUNS, 600, LADDER, rate=0.5)
    better_ones = trials.superior(rng(2), RUNS, 600, LADDER, rate=0.7)

    assert equal.share <= 0.08
    assert better_ones.median is not None
    assert better_ones.median <= 60


def test_a_rule_without_proof_promotes_equal_students_and_the_simulation_shows_it() -> None:
    credulous = PromotionSettings(evidence=1.0)

    assert trials.superior(rng(1), RUNS, 600, credulous, rate=0.5).share > 0.3


def test_the_published_gate_promotes_equal_students_often() -> None:
    assert 0.22 <= trials.published_gate(rng(3), 2000, 500, LADDER).share <= 0.32


def test_larger_losses_are_noticed_sooner() -> None:
    small, large = (trials.rolled_back(rng(4), 60, WATCH, loss=loss).median for loss in (0.15, 0.30))

    assert small is not None
    assert large is not None
    assert large < 50 < small < 150


def test_a_watch_that_is_easily_frightened_rolls_back_for_nothing_and_the_simulation_shows_it() -> None:
    nervous = WatchSettings(outcomes_between_false_alarms=1000)

    assert trials.false_rollbacks(rng(5), 20, 5000, nervous) > 10


@pytest.mark.parametrize("kind", ["constant_answer", "contaminated"])
def test_students_that_cheat_are_refused(kind: str) -> None:
    assert trials.refused(rng(6), 30, LADDER, kind=kind)  # type: ignore[arg-type]


def test_a_year_promotes_most_of_those_who_deserve_it_and_hardly_anybody_else() -> None:
    year = fleet.year(rng(7), LADDER, STAGES, students=60)

    assert year.deserving > 0
    assert year.promoted - year.false >= 0.7 * year.deserving
    assert year.false <= 1


def test_the_command_writes_the_report_of_its_contract_and_a_picture(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    main(
        ["simulate", "--runs", "20", "--seed", "3", "--report", str(report), "--config", str(CHECKOUT / "configs"), "--home", str(tmp_path)]
    )
    told = json.loads(report.read_text())

    assert told["runs"] == 20
    assert {"superiority_equal", "superiority_worse", "noninferiority_at_margin", "good_enough_at_floor", "fleet_year"} <= set(
        told["false_promotion_rate"]
    )
    assert set(told["median_queries_to_promote"]) == {"0.60", "0.70", "good_enough_plus_0.20"}
    assert set(told["control_published_gate"]) >= {"equal_peeked_to_500"}
    assert {"median_outcomes_15", "median_outcomes_30", "false_per_100k"} <= set(told["rollback"])
    assert told["refused"] == {"constant_answer": True, "contaminated": True}
    assert report.with_suffix(".svg").read_text().rstrip().endswith("</svg>")


def test_too_few_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--runs", "3", "--config", str(CHECKOUT / "configs"), "--home", str(tmp_path)]) == 1
    assert "at least 20" in capsys.readouterr().err
