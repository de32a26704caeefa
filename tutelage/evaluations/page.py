"""A replay's report as one HTML file that needs nothing else: the cost-quality curve against its baselines, and the table.

It refuses to compute: every figure is the report's. All text is escaped by the template engine; the plot is the only markup that passes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("replay.html.j2")
COLOURS = ("#0a7d6c", "#c27a00", "#5560b8", "#b3382f", "#7a6a53", "#8a4b9c")
GREY = "#8a96a3"


def render(report: Mapping[str, Any]) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    plot = Markup(_plot(report))  # noqa: S704  drawn from numbers, and names that matplotlib escapes
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(report=report, plot=plot)


def _plot(report: Mapping[str, Any]) -> str:
    """Curves of the default policy and of the baselines that have one; operating points as dots. pyplot stays out of it."""
    import matplotlib
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.subplots()
        _draw(axes, report)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


def _draw(axes: Any, report: Mapping[str, Any]) -> None:
    default = report["policies"][report["default"]]
    curves = {report["default"]: default["curve"]} | {name: found["curve"] for name, found in report["baselines"].items()}
    lines = {name: curve for name, curve in curves.items() if len(curve) > 1}
    for colour, (name, curve) in zip(COLOURS, lines.items(), strict=False):
        ours = name == report["default"]
        style = (
            {"color": colour, "linewidth": 2.2} if ours else {"color": GREY if name == "random" else colour, "linewidth": 1, "alpha": 0.8}
        )
        axes.plot(*zip(*curve, strict=True), label=f"{name} (policies' ranking)" if ours else name, **style)
    two = len(report["models"]) == 2
    for name, found in (report["policies"] | report["baselines"]).items():
        x = found["share"].get("strong", found["mean_cost_usd"]) if two and found["mean_cost_usd"] is None else found["mean_cost_usd"]
        if x is None:
            axes.axhline(found["mean_quality"], color=GREY, linewidth=0.6, linestyle=(0, (4, 3)))
            axes.annotate(name, (1.0, found["mean_quality"]), xycoords=("axes fraction", "data"), fontsize=7, va="bottom", ha="right")
        elif name in report["policies"] or name.startswith("always-"):
            axes.scatter([x], [found["mean_quality"]], color=COLOURS[0] if name in report["policies"] else GREY, zorder=3, s=22)
            axes.annotate(name, (x, found["mean_quality"]), xytext=(4, -10), textcoords="offset points", fontsize=7)
    axes.set(xlabel=report["units"]["curve"][0], ylabel=report["units"]["curve"][1])
    axes.grid(visible=True, linewidth=0.4)
    axes.legend(frameon=False, fontsize=8)
