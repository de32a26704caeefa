"""A student's learning curve and reliability diagram, and a day's quarters, as inline SVG that takes its colours from the page around it.

matplotlib draws; every colour is a stand-in that is replaced by a CSS variable, so one drawing suits a light and a dark page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tutelage.demo.outcome import CurvePoint, Reliability
from tutelage.demo.quarters import Quarter

INK, MUTED, LINE, STUDENT, TEACHER, CACHE = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
CSS = {INK: "--ink", MUTED: "--muted", LINE: "--line", STUDENT: "--student", TEACHER: "--teacher", CACHE: "--cache"}
SIZE = (3.6, 2.7)  # inches, at 72 units each: drawn at about its own size on a phone
STYLE = {
    "svg.fonttype": "none",  # letters stay letters: selectable, and in the page's own font
    "text.parse_math": False,  # a domain may be called $x$
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
    "legend.fontsize": 8,
}


def reliability_diagram(measured: Reliability, threshold: float, name: str) -> str:
    """Confidence against share right, a point a bin with its interval; shaded where the cascade serves.

    `name` is unique on the page.
    """
    return _drawn(
        lambda figure: _draw_reliability(figure.subplots(), measured, threshold),
        name,
        f"Stated confidence against share right, {measured.n} answers",
    )


def learning_curve(curve: Sequence[CurvePoint], name: str) -> str:
    """Loss by optimiser step and, below it, validation accuracy where it was measured. `name` is unique on the page."""
    return _drawn(lambda figure: _draw_curve(figure, curve), name, "Loss and validation accuracy by optimiser step")


def day(quarters: Sequence[Quarter]) -> dict[str, str]:
    """By what they show: who paid and saved what, quality and waiting time by quarter."""
    drawn = {
        "cost": (_draw_cost, "Cost of 1,000 requests by quarter: paid, saved by students, saved by cache"),
        "quality": (_draw_quality, "Share right by quarter: as served, students alone, always-teacher"),
        "latency": (_draw_latency, "Seconds of waiting by quarter: median and 95th percentile, and always-teacher's"),
    }
    return {name: _drawn(partial(draw, quarters=quarters), f"day-{name}", label) for name, (draw, label) in drawn.items()}


def _draw_cost(figure: Any, quarters: Sequence[Quarter]) -> None:
    axes, full = figure.subplots(), [q.alone_cost_per_1k_usd or 0.0 for q in quarters]
    cache, students = ([part * cost for part, cost in zip(parts, full, strict=True)] for parts in _savings(quarters))
    paid = [q.cost_per_1k_usd or 0.0 for q in quarters]
    numbers = _numbers(quarters)
    axes.bar(numbers, paid, color=TEACHER, label="paid")
    axes.bar(numbers, students, bottom=paid, color=STUDENT, label="saved by students")
    axes.bar(numbers, cache, bottom=[a + b for a, b in zip(paid, students, strict=True)], color=CACHE, label="saved by cache")
    axes.plot(numbers, full, color=INK, linewidth=1.0, marker="_", markersize=16, linestyle="none", label="always-teacher")
    axes.set(ylabel="$ per 1,000 requests", ylim=(0, 1.35 * max(full, default=1.0)))
    _by_quarter(axes, numbers, legend="upper center")


def _savings(quarters: Sequence[Quarter]) -> tuple[list[float], list[float]]:
    """Shares saved by cache and by students; what trying and checking cost is taken from the students' part, so that bars add up."""
    return (
        [q.saved.by_cache for q in quarters],
        [max(q.saved.by_students + q.saved.by_escalations + q.saved.by_checks, 0.0) for q in quarters],
    )


def _draw_quality(figure: Any, quarters: Sequence[Quarter]) -> None:
    axes, numbers = figure.subplots(), _numbers(quarters)
    alone = [q.alone.accuracy for q in quarters]
    axes.plot(numbers, alone, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), marker="o", markersize=3, label="always-teacher")
    for number, q in zip(numbers, quarters, strict=True):
        if q.by_students_right is not None and q.by_students_wilson95 is not None:
            axes.plot([number + 0.08] * 2, q.by_students_wilson95, color=STUDENT, linewidth=1.0, alpha=0.6)
    by_students = [
        (number + 0.08, q.by_students_right) for number, q in zip(numbers, quarters, strict=True) if q.by_students_right is not None
    ]
    if by_students:
        axes.plot(*zip(*by_students, strict=True), color=STUDENT, linewidth=1.0, marker="s", markersize=3, label="given by students")
    axes.plot(numbers, [q.served.accuracy for q in quarters], color=INK, linewidth=1.4, marker="o", markersize=3, label="as served")
    axes.set(ylabel="share right", ylim=(0, 1.05))
    _by_quarter(axes, numbers, legend="lower center")


def _draw_latency(figure: Any, quarters: Sequence[Quarter]) -> None:
    axes, numbers = figure.subplots(), _numbers(quarters)
    for who, colour, told in (("always-teacher", MUTED, "always-teacher"), ("all", STUDENT, "as served")):
        shown = [q.latency[who] for q in quarters]
        axes.plot(
            numbers, [one.p50_seconds for one in shown], color=colour, linewidth=1.6, marker="o", markersize=3, label=f"{told}, median"
        )
        axes.plot(numbers, [one.p95_seconds for one in shown], color=colour, linewidth=1.0, linestyle=(0, (4, 3)), label=f"{told}, 95 %")
    axes.set(ylabel="seconds of waiting", ylim=(0, 1.35 * axes.get_ylim()[1]))
    _by_quarter(axes, numbers, legend="upper center")


def _numbers(quarters: Sequence[Quarter]) -> list[int]:
    return list(range(1, len(quarters) + 1))


def _by_quarter(axes: Any, numbers: Sequence[int], *, legend: str) -> None:
    axes.set(xlabel="quarter of the day", xticks=numbers, xlim=(0.5, len(numbers) + 0.5))
    axes.legend(loc=legend, fontsize=7, ncols=2)


def _draw_reliability(axes: Any, measured: Reliability, threshold: float) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.axvspan(threshold, 1.02, color=STUDENT, alpha=0.12, linewidth=0)
    for point in measured.bins:
        axes.plot([point.confidence] * 2, point.wilson95, color=STUDENT, linewidth=1.2)
    largest = max((point.n for point in measured.bins), default=1)
    axes.scatter(
        [point.confidence for point in measured.bins],
        [point.accuracy for point in measured.bins],
        s=[12 + 48 * point.n / largest for point in measured.bins],
        color=STUDENT,
        zorder=3,
        clip_on=False,
    )
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="stated confidence", ylabel="share right")
    axes.text(threshold - 0.02, 0.02, f"served from {threshold:.2f}", color=MUTED, fontsize=8, ha="right", va="bottom")


def _draw_curve(figure: Any, curve: Sequence[CurvePoint]) -> None:
    trained = [(p.step, p.loss) for p in curve if p.loss is not None]
    checked = [(p.step, p.validation_loss) for p in curve if p.validation_loss is not None]
    right = [(p.step, p.validation_accuracy) for p in curve if p.validation_accuracy is not None]
    rows = 2 if right else 1
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=[3, 2][:rows])[:, 0]
    bold = {"color": STUDENT, "linewidth": 1.6, "marker": "o", "markersize": 3}
    if trained:
        panels[0].plot(*zip(*trained, strict=True), color=MUTED, linewidth=0.8, label="training")
    if checked:
        panels[0].plot(*zip(*checked, strict=True), **bold, label="validation")
    panels[0].set(ylabel="loss (nats)", ylim=(0, None))
    if trained or checked:
        panels[0].legend(loc="upper right")
    if right:
        panels[1].plot(*zip(*right, strict=True), **bold)
        panels[1].set(ylim=(-0.05, 1.05), ylabel="share right")
    panels[-1].set_xlabel("optimiser step")


def _drawn(draw: Callable[[Any], None], name: str, label: str) -> str:
    """The SVG of what `draw` puts on a figure. pyplot stays out: it keeps figures and looks for a display."""
    import matplotlib
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from font.*")  # the browser has a font for it
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(file.getvalue(), name, label)


def _themed(svg: str, name: str, label: str) -> str:
    drawing = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    drawing = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", drawing)  # ids are the page's, not the drawing's
    drawing = re.sub(r"font: (?:[a-z0-9]+ )*?([\d.]+px) [^;\"]+", r"font-size: \1", drawing)
    drawing = re.sub(r"font-family: [^;\"]+", "font-family: inherit", drawing)
    for stand_in, variable in CSS.items():
        drawing = drawing.replace(stand_in, f"var({variable})")
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
