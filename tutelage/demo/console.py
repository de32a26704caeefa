"""What a demo prints: its progress while it runs, its report at the end.

Bars on a terminal, plain lines elsewhere. It refuses to know what the stages do and how the figures came about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.console import Group as Lines
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from tutelage.demo import figures
from tutelage.demo.outcome import PHASES, TIERS, Interval, Outcome
from tutelage.demo.quarters import DayOutcome

QUIET_SECONDS = 15.0  # between two plain lines about the same thing
DECISION_WORDS = {"promoted": ("promoted", "green"), "kept_student": ("kept student", "yellow"), "refused": ("refused", "red")}


class Stage(Protocol):
    """One stage under way."""

    def advance(self, count: int = 1) -> None:
        """`count` more of the stage's total are done."""
        ...

    def note(self, stage: str, text: str, *, student: str | None = None, done: int | None = None, total: int | None = None) -> None:
        """Where a step of this stage is; a student's steps share one line, which its next note replaces."""
        ...


class Progress:
    """Shows stages as they happen, on stderr unless told otherwise. Use as a context manager."""

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._bars = _bars(self._console) if self._console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print one line, above the bars where there are any."""
        self._console.print(Text(text))

    @contextmanager
    def stage(self, title: str, *, total: int | None = None) -> Iterator[Stage]:
        """A stage of `total` things, None where that is unknown. An exception marks it as stopped and passes through."""
        stage = BarStage(self._bars, title, total) if self._bars else LineStage(self.say, title, total, self._clock)
        try:
            yield stage
        except BaseException:
            stage.end("stopped")
            raise
        stage.end("done")


class BarStage:
    """A stage on a terminal: a bar of its own, and one below it for each student."""

    def __init__(self, bars: Bars, title: str, total: int | None) -> None:
        self._bars = bars
        self._title = title
        self._total = total
        self._task = bars.add_task(title, total=total, detail="")
        self._students: dict[str, TaskID] = {}

    def advance(self, count: int = 1) -> None:
        self._bars.advance(self._task, count)

    def note(self, stage: str, text: str, *, student: str | None = None, done: int | None = None, total: int | None = None) -> None:
        if student is None:
            self._bars.update(self._task, detail=_brief(f"{stage}: {text}"))
            if total is not None:
                self._total = total
                self._bars.update(self._task, total=total, completed=done or 0)
            return
        if student not in self._students:
            self._students[student] = self._bars.add_task(f"  {student}", total=None, detail="")
        self._bars.update(self._students[student], total=total, completed=done or 0, detail=_brief(f"{stage}: {text}"))

    def end(self, how: str) -> None:
        for student in self._students.values():
            self._bars.stop_task(student)
        if how == "done":
            total = self._total or 1  # one of one, where there was nothing to count
            self._bars.update(self._task, total=total, completed=total)
        else:
            self._bars.update(self._task, detail=how)
        self._bars.stop_task(self._task)


class LineStage:
    """A stage where no cursor can be moved: a line when it starts and ends, and now and then between."""

    def __init__(self, say: Callable[[str], None], title: str, total: int | None, clock: Callable[[], float]) -> None:
        self._say = say
        self._title = title
        self._total = total
        self._clock = clock
        self._started = clock()
        self._done = 0
        self._last: dict[tuple[str | None, str], float] = {(None, title): self._started}
        say(f"{title}: started" if total is None else f"{title}: started, {total} to do")

    def advance(self, count: int = 1) -> None:
        self._done += count
        if self._is_due((None, self._title)):
            self._say(f"{self._title}: {_of(self._done, self._total)}, {self._elapsed()}")

    def note(self, stage: str, text: str, *, student: str | None = None, done: int | None = None, total: int | None = None) -> None:
        finished = done is not None and done == total
        if self._is_due((student, stage)) or finished:
            where = " · ".join(part for part in (self._title, student, stage) if part)
            count = "" if done is None else f" ({_of(done, total)})"
            self._say(f"{where}{count}: {text}")

    def end(self, how: str) -> None:
        count = f" at {_of(self._done, self._total)}" if how != "done" and self._total else ""
        self._say(f"{self._title}: {how}{count} after {self._elapsed()}")

    def _is_due(self, key: tuple[str | None, str]) -> bool:
        now, last = self._clock(), self._last.get(key)
        if last is not None and now - last < QUIET_SECONDS:
            return False
        self._last[key] = now
        return True

    def _elapsed(self) -> str:
        return figures.seconds(self._clock() - self._started)


def print_report(outcome: Outcome, console: Console | None = None) -> None:
    """The report as tables, on stdout unless told otherwise."""
    out = console or Console(highlight=False)
    out.print()
    out.print(Panel(Text(figures.headline(outcome), style="bold"), title="What the students took over", border_style="cyan"))
    if outcome.day is not None:
        out.print(_day_table(outcome.day))
        out.print(_told_of(outcome.day))
    out.print(_traffic_table(outcome))
    out.print(_held_out_table(outcome))
    out.print(_students_table(outcome))
    out.print(_reasons(outcome))
    out.print(_footnotes(outcome))
    if outcome.next_steps:
        out.print(_next_steps(outcome))


def _day_table(day: DayOutcome) -> Table:
    table = _table(
        "The day, against the teacher alone", ("quarter",), ("n", "$/1,000", "alone", "saved", "students", "cache", "right", "kept", "p50")
    )
    for number, q in enumerate(day.quarters, start=1):
        table.add_row(
            str(number),
            f"{q.n:,}",
            figures.usd(q.cost_per_1k_usd),
            figures.usd(q.alone_cost_per_1k_usd),
            *(figures.share(part) for part in (q.saved.share, q.saved.by_students, q.saved.by_cache)),
            figures.score(q.served.accuracy),
            figures.share(q.quality.ratio),
            figures.waited(q.latency["all"].p50_seconds),
        )
    return table


def _told_of(day: DayOutcome) -> Lines:
    """What was asked and measured, and what each cycle decided."""
    words = {True: "reached", False: "missed", None: "not measured"}
    lines = [Text(f"{words[t.met]}: {t.what}: {figures.score(t.measured)} (at least {t.asked:.2f})") for t in day.targets]
    for cycle in day.cycles:
        made = ", ".join(f"{v.task} v{v.version} {v.action}" for v in cycle.versions) or "nothing worth a student"
        lines.append(Text(f"cycle after quarter {cycle.after}, {figures.seconds(cycle.seconds)}: {made}"))
    lines += [Text(f"quarter {d.quarter}: {d.task} v{d.version} {d.action}, {d.reason}", style="dim") for d in day.decisions]
    return Lines(*lines, Text())


def _traffic_table(outcome: Outcome) -> Table:
    cached = any(outcome.traffic["all"][phase].share_cached for phase in PHASES)
    table = _table("Traffic", ("requests",), ("n", "$/1,000", "right", *TIERS, *(["cached"] if cached else [])))
    table.caption, table.caption_justify = _savings(outcome), "left"
    for name in figures.shown(outcome):
        for phase in PHASES:
            part = outcome.traffic[name][phase]
            table.add_row(
                f"{name} {phase}",
                f"{part.n:,}",
                figures.usd(part.cost_per_1k_usd),
                _scored(part.accuracy, part.accuracy_wilson95),
                *(figures.share(part.share_by_tier[tier] if part.n else None) for tier in TIERS),
                *([figures.share(part.share_cached)] if cached else []),
            )
    return table


def _savings(outcome: Outcome) -> Text:
    savings = {name: outcome.savings[name] for name in figures.shown(outcome)}
    parts = [
        f"{name}: {figures.share(saved.share)} saved {figures.share_within(saved.interval95)}".strip() for name, saved in savings.items()
    ]
    return Text(" · ".join(parts) + " (95 % interval)\n", style="bold")


def _held_out_table(outcome: Outcome) -> Table:
    table = _table("Held-out items: share right", ("task", "decision"), ("n", "majority", "before", "after"))
    for task, domain in outcome.domains.items():
        word, colour = DECISION_WORDS[domain.decision]
        table.add_row(
            Text(task),
            Text(word, style=colour),
            str(domain.n_test),
            figures.score(domain.majority),
            figures.score(domain.before),
            _scored(domain.after, domain.wilson95),
        )
    return table


def _students_table(outcome: Outcome) -> Table:
    table = _table("Unseen traffic: what students did with it", ("task",), ("answered", "precision", "ECE", "$ before", "$ after"))
    for task, domain in outcome.domains.items():
        table.add_row(
            Text(task),
            figures.share(domain.share_by_student),
            _scored(domain.student_precision, domain.student_precision_wilson95),
            figures.score(domain.ece),
            *(figures.usd(domain.served[phase].cost_per_1k_usd) for phase in PHASES),
        )
    return table


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table of some columns of words, then some of numbers; narrow enough for 80 characters."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in words:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _scored(value: float | None, interval: Interval | None) -> Text:
    """As Text, because rich reads square brackets in a string as markup."""
    return Text(f"{figures.score(value)} {figures.score_within(interval)}".strip())


def _reasons(outcome: Outcome) -> Lines:
    lines = [Text("Why", style="bold")]
    for task, domain in outcome.domains.items():
        lines.append(Text.assemble("  ", (task, "bold"), ": ", domain.reason))
    return Lines(*lines, Text())


def _footnotes(outcome: Outcome) -> Lines:
    earned = outcome.training.break_even_requests
    training = f"Training took {outcome.training.core_seconds:,.0f} core-seconds, {figures.usd(outcome.training.cost_usd)}"
    back = f", earned back after {earned:,} such requests." if earned is not None else "; such traffic does not earn it back."
    took = f"The run took {figures.seconds(outcome.wall_seconds)} and at most {outcome.peak_rss_mb:,.0f} MB of memory"
    measure = f"{took} (sum of {outcome.memory_measure} over all its processes)."
    lines = [outcome.teacher["note"], training + back, measure, *outcome.notes]
    return Lines(*(Text(line, style="dim") for line in lines), Text())


def _next_steps(outcome: Outcome) -> Lines:
    lines = [Text("Where to look next", style="bold")]
    lines += [Text.assemble("  ", (step.open, "cyan"), "  ", step.shows) for step in outcome.next_steps]
    return Lines(*lines)


def _bars(console: Console) -> Bars:
    return Bars(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=console,
    )


def _brief(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _of(done: int, total: int | None) -> str:
    return f"{done} done" if total is None else f"{done} of {total}"
