"""The report as one HTML file that needs nothing else: no script, no font, no picture from anywhere.

It refuses to compute: every figure is the outcome's, written by `figures`. All text is escaped by the template engine; the
plots are the only markup that passes.
"""

from __future__ import annotations

from pathlib import Path

from tutelage.demo import figures
from tutelage.demo.outcome import PHASES, TIERS, Outcome

TEMPLATE = Path(__file__).with_name("page.html.j2")
DECISION_WORDS = {"promoted": "promoted to TA", "kept_student": "kept as student", "refused": "refused"}


def render(outcome: Outcome) -> str:
    """The page as text. Takes a second or two: matplotlib draws two plots a student."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        share=figures.share,
        score=figures.score,
        usd=figures.usd,
        score_within=figures.score_within,
        share_within=figures.share_within,
        seconds=figures.seconds,
        waited=figures.waited,
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        outcome=outcome,
        headline=figures.headline(outcome),
        shown=figures.shown(outcome),
        by_students=figures.by_students,
        plots=_plots(outcome),
        day_plots=_day_plots(outcome),
        phases=PHASES,
        tiers=TIERS,
        decision_words=DECISION_WORDS,
    )


def _day_plots(outcome: Outcome) -> dict[str, str]:
    from markupsafe import Markup

    from tutelage.demo import plots

    if outcome.day is None:
        return {}
    return {name: Markup(svg) for name, svg in plots.day(outcome.day.quarters).items()}  # noqa: S704  drawn from numbers alone


def _plots(outcome: Outcome) -> dict[tuple[str, str], dict[str, str]]:
    """By (task, student): the SVGs there is something to draw on, safe to put on the page as they are."""
    from markupsafe import Markup

    from tutelage.demo import plots

    drawn: dict[tuple[str, str], dict[str, str]] = {}
    students = [(task, student) for task, domain in outcome.domains.items() for student in domain.students]
    for number, (task, student) in enumerate(students):
        svgs = drawn[task, student.name] = {}
        if student.reliability.bins:
            svg = plots.reliability_diagram(student.reliability, outcome.threshold, f"r{number}")
            svgs["reliability"] = Markup(svg)  # noqa: S704  drawn from numbers alone
        if student.curve:
            svgs["curve"] = Markup(plots.learning_curve(student.curve, f"c{number}"))  # noqa: S704  likewise
    return drawn
