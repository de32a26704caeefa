"""The simulation as a picture: who is promoted by when, under our rules and under the published gate, and how soon a loss is noticed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.simulation.trials import Trial

OURS, TRUE, CONTROL = "#1f77b4", "#2ca02c", "#d62728"
PROMOTED = (
    ("superiority_equal", "equal student, e-process", OURS, "-"),
    ("good_enough_at_floor", "exactly at the floor, e-process", OURS, ":"),
    ("published_gate", "equal student, published gate", CONTROL, "-"),
    ("0.60", "true win rate 0.60, e-process", TRUE, "--"),
    ("0.70", "true win rate 0.70, e-process", TRUE, "-"),
)
NOTICED = (("rollback_15", "0.90 → 0.75", OURS, "-"), ("rollback_30", "0.90 → 0.60", TRUE, "-"))


def draw(trials: Mapping[str, Trial], file: Path) -> None:
    """Write an SVG; without a display and without pyplot, which keeps figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label, colour, dashes in PROMOTED:
        _curve(left, trials[name], label, colour, dashes)
    left.axhline(0.05, color="grey", linewidth=0.8, linestyle=(0, (4, 3)))
    left.set(xscale="log", xlim=(10, 2000), ylim=(0, 1), xlabel="queries, checked after every one", ylabel="share promoted")
    left.set_title("Promotions")
    left.legend(frameon=False, fontsize=8)
    for name, label, colour, dashes in NOTICED:
        _curve(right, trials[name], label, colour, dashes)
    right.set(xlim=(0, 300), ylim=(0, 1), xlabel="verified outcomes since the loss", ylabel="share rolled back")
    right.set_title("Rollbacks of a champion whose acceptance falls")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(file, format="svg", metadata={"Date": None})


def _curve(axes: Any, trial: Trial, label: str, colour: str, dashes: str) -> None:
    """The share promoted by each query."""
    done: Sequence[int] = sorted(after for after in trial.promoted if after is not None)
    if done:
        shares = [(number + 1) / len(trial.promoted) for number in range(len(done))]
        axes.step([*done, trial.horizon], [*shares, shares[-1]], where="post", label=label, color=colour, linestyle=dashes)
    else:
        axes.plot([1, trial.horizon], [0, 0], label=label, color=colour, linestyle=dashes)
