"""What `tutelage simulate` does: measure under a progress bar, write the report and its picture, say which targets were missed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tutelage.errors import InvalidRequest
from tutelage.evolution.promotion import PromotionSettings
from tutelage.evolution.rollout import RolloutSettings
from tutelage.evolution.watch import WatchSettings
from tutelage.settings import load
from tutelage.simulation import plots
from tutelage.simulation.report import Rules, measure, steps

LEAST_RUNS = 20
# what is measured, where it stands in the report, and between what it must lie
TARGETS: tuple[tuple[str, tuple[str, ...], float, float], ...] = (
    ("false promotions: superiority, equal", ("false_promotion_rate", "superiority_equal"), 0, 0.05),
    ("false promotions: superiority, worse", ("false_promotion_rate", "superiority_worse"), 0, 0.05),
    ("false promotions: non-inferiority, at the margin", ("false_promotion_rate", "noninferiority_at_margin"), 0, 0.05),
    ("false promotions: good enough, at the floor", ("false_promotion_rate", "good_enough_at_floor"), 0, 0.05),
    ("false share of a year's promotions", ("false_promotion_rate", "fleet_year"), 0, 0.05),
    ("median queries at a win rate of 0.60", ("median_queries_to_promote", "0.60"), 0, 200),
    ("median queries at a win rate of 0.70", ("median_queries_to_promote", "0.70"), 0, 45),
    ("median queries, good enough by 0.20", ("median_queries_to_promote", "good_enough_plus_0.20"), 0, 100),
    ("control: published gate, equal student", ("control_published_gate", "equal_peeked_to_500"), 0.22, 0.32),
    ("median outcomes to roll back, 15 points lost", ("rollback", "median_outcomes_15"), 0, 150),
    ("median outcomes to roll back, 30 points lost", ("rollback", "median_outcomes_30"), 0, 50),
    ("false rollbacks in 100,000 outcomes", ("rollback", "false_per_100k"), 0, 1),
    ("constant answer refused", ("refused", "constant_answer"), 1, 1),
    ("contaminated student refused", ("refused", "contaminated"), 1, 1),
)


def simulate(config_dir: Path, *, seed: int, runs: int, report: Path | None) -> None:
    """Print what was measured beside what was promised, and write it where a report is wanted.

    Raises:
        InvalidRequest: too few runs for any figure.
        ConfigInvalid: a settings file holds an unknown key or a wrong value.
    """
    if runs < LEAST_RUNS:
        raise InvalidRequest(f"--runs {runs}: shares of so few runs say nothing; give at least {LEAST_RUNS}")
    rules = Rules(load(PromotionSettings, config_dir), load(RolloutSettings, config_dir), load(WatchSettings, config_dir))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("simulating", total=steps(runs))
        measured = measure(seed, runs, rules, lambda done: progress.update(bar, advance=1, description=f"{done} done"))
    rows = list(_rows(measured.report))
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(measured.report, indent=2) + "\n")
        plots.draw(measured.trials, report.with_suffix(".svg"))
    _show(rows, runs)
    if report is not None:
        print(f"report in {report}, picture in {report.with_suffix('.svg')}")


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, float | bool | None, str, bool]]:
    for name, (part, key), low, high in TARGETS:
        value = report[part][key]
        wanted = "yes" if low == high else f"{low:g} to {high:g}" if low else f"at most {high:g}"
        yield name, value, wanted, value is not None and low <= value <= high


def _show(rows: list[tuple[str, float | bool | None, str, bool]], runs: int) -> None:
    table = Table("measured", "value", "target", "met", title=f"{runs} runs each, looked at after every query")
    for name, value, wanted, met in rows:
        shown = "never" if value is None else str(value) if isinstance(value, bool) else f"{value:.4g}"
        table.add_row(name, shown, wanted, "yes" if met else "NO")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
