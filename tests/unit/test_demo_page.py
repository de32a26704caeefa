"""What a reader sees: the page stands alone, is honest and escapes all text; the terminal shows the same figures."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import observations
import pytest
from rich.console import Console

from tutelage.demo import figures
from tutelage.demo.console import Progress, print_report
from tutelage.demo.memory import PeakMemory
from tutelage.demo.outcome import Outcome, summarise
from tutelage.demo.page import render

HOSTILE = '<script>alert("x")</script> $x_1$ [bold red] {{ 7 * 7 }}'
VOID = {"meta", "br", "hr", "img", "input", "link"}


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return summarise(observations.answered(), observations.trained(), observations.run())


@pytest.fixture(scope="module")
def page(outcome: Outcome) -> str:
    return render(outcome)


class Reader(HTMLParser):
    """Collects tags, ids and references, and fails on a tag that closes another one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            self.ids += [str(value)] if name == "id" else []
            self.references += [str(value)] if name in ("src", "href", "xlink:href") else []
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def printed(outcome: Outcome, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(outcome, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_page_is_well_formed_and_needs_nothing_from_outside(page: str) -> None:
    reader = read(page)

    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids)) > 0
    assert reader.references
    assert all(reference.startswith("#") and reference[1:] in reader.ids for reference in reader.references)
    assert not reader.tags & {"script", "link", "img", "iframe"}
    assert "@import" not in page


def test_every_task_is_on_the_page_with_its_decision_reason_and_plots(outcome: Outcome, page: str) -> None:
    text = re.sub(r"\s+", " ", page)
    for task, domain in outcome.domains.items():
        assert f"<h3>{task}</h3>" in text
        assert domain.reason in text
        assert f"{figures.score(domain.after)} <span" in text
    assert text.count("promoted to TA") == 4  # two students, each with its figures and its plots
    assert page.count("Loss and validation accuracy by optimiser step") == 5
    assert page.count("Stated confidence against share right") == 4  # the refused one was never asked


def test_plots_take_their_colours_from_the_page(page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))

    assert "stroke: var(--student)" in drawings
    assert not re.search(r"#0[1-9]0[1-9]0[1-9]|#ffffff|#000000", drawings)


def test_text_from_outside_is_shown_as_text_and_never_obeyed() -> None:
    answers = [replace(a, task=HOSTILE) if a.task == "aiw" else a for a in observations.answered()]
    trained = [replace(t, task=HOSTILE, reason=HOSTILE, student=HOSTILE) if t.task == "aiw" else t for t in observations.trained()]
    hostile = summarise(answers, trained, observations.run(source=HOSTILE, notes=(HOSTILE,), versions={HOSTILE: HOSTILE}))

    page = render(hostile)

    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    assert "{{ 7 * 7 }}" in page
    assert read(page).open == []
    assert "[bold red]" in printed(hostile, width=200)


def test_the_headline_says_what_was_saved_at_what_accuracy(outcome: Outcome, page: str) -> None:
    after, saved = outcome.traffic["all"]["after"], outcome.savings["all"].share
    sentence = figures.headline(outcome)

    assert sentence in page
    assert f"the bill fell by {figures.share(saved)}" in sentence
    assert f"{figures.share(after.accuracy)} of all answers were right" in sentence
    assert outcome.teacher["note"] in page


def test_a_dearer_run_is_called_dearer(outcome: Outcome) -> None:
    dearer = replace(outcome, savings={**outcome.savings, "all": replace(outcome.savings["all"], share=-0.12)})

    assert "the bill rose by 12 %" in figures.headline(dearer)


def test_a_run_that_was_interrupted_before_any_replay_still_has_a_page_and_a_report() -> None:
    before = [a for a in observations.answered() if a.phase == "before"]
    partial = summarise(before, [], observations.run())

    assert "nothing can be said about savings yet" in render(partial)
    assert "nothing can be said about savings yet" in " ".join(printed(partial, width=200).split())
    assert "nothing was trained" in render(partial)


def test_where_all_tasks_are_learnable_the_same_figures_are_not_shown_twice(outcome: Outcome) -> None:
    everything = summarise(observations.answered(), [], observations.run(learnable=frozenset(observations.STUDENTS)))

    assert figures.shown(outcome) == ("all", "learnable")
    assert figures.shown(everything) == ("all",)
    assert "Learnable tasks only" not in render(everything)


def test_the_terminal_report_fits_80_columns_with_every_figure_whole(outcome: Outcome) -> None:
    text = printed(outcome)

    assert max(map(len, text.splitlines())) <= 80
    for task, domain in outcome.domains.items():
        held_out = f"{figures.score(domain.after)} {figures.score_within(domain.wilson95)}"
        assert re.search(rf"^ {task} .* {re.escape(held_out)} *$", text, flags=re.MULTILINE)
    for step in outcome.next_steps:
        assert step.open in text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0 %"), (1.0, "100 %"), (0.996, "99.6 %"), (0.4567, "46 %"), (-0.2, "-20 %")]
)
def test_shares_never_round_almost_all_to_all(value: float | None, text: str) -> None:
    assert figures.share(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "$0.00"), (1234.5, "$1,234.50"), (0.1234, "$0.123"), (0.01234, "$0.0123"), (0.00012, "$0.00012")]
)
def test_dollars_keep_the_digits_that_matter(value: float | None, text: str) -> None:
    assert figures.usd(value) == text


@pytest.mark.parametrize(("value", "text"), [(4.23, "4.2 s"), (75.4, "1:15 min"), (3723.0, "1:02:03 h")])
def test_durations_are_written_for_people(value: float, text: str) -> None:
    assert figures.seconds(value) == text


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_stage(console: Console, clock: Clock) -> None:
    with Progress(console, clock=clock) as progress, progress.stage("sending", total=100) as stage:
        progress.say("now")
        for _ in range(100):
            clock.now += 0.4
            stage.advance()
        stage.note("finetune", "loss 0.5", student="demo-aiw", done=1, total=2)
        stage.note("finetune", "loss 0.4", student="demo-aiw", done=2, total=2)
        stage.note("gaps", "5 found")


def test_without_a_terminal_progress_is_a_few_plain_lines() -> None:
    out = io.StringIO()
    run_stage(Console(file=out, width=100), Clock())

    assert out.getvalue().splitlines() == [
        "sending: started, 100 to do",
        "now",
        "sending: 38 of 100, 15.2 s",
        "sending: 76 of 100, 30.4 s",
        "sending · demo-aiw · finetune (1 of 2): loss 0.5",
        "sending · demo-aiw · finetune (2 of 2): loss 0.4",
        "sending · gaps: 5 found",
        "sending: done after 40.0 s",
    ]


def test_on_a_terminal_progress_is_bars_with_one_for_each_student() -> None:
    out = io.StringIO()
    run_stage(Console(file=out, width=120, force_terminal=True), Clock())

    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines()[-2:]
    assert "sending" in last[0]
    assert "100/100" in last[0]
    assert "demo-aiw" in last[1]
    assert "loss 0.4" in last[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_an_interrupted_stage_says_so_and_lets_the_interrupt_through(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=terminal)

    def interrupted() -> None:
        with Progress(console) as progress, progress.stage("evolving", total=10):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert "stopped" in out.getvalue()


def test_memory_counts_a_child_process_and_one_that_is_nobodys_child() -> None:
    def hold(megabytes: int) -> subprocess.Popen[Any]:
        code = f"held = bytearray({megabytes}_000_000); print(flush=True); input()"
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    with PeakMemory([os.getpid()], interval=0.05) as memory:
        alone = memory.sample() / 1e6
        with hold(100) as child:
            assert child.stdout is not None
            child.stdout.readline()
            together = memory.sample() / 1e6
            only = PeakMemory([])
            only.add(child.pid)
            separate = only.sample() / 1e6
            child.communicate(b"\n")

    assert together - alone > 90
    assert 90 < separate < 200
    assert memory.peak_mb >= alone


def test_memory_of_a_process_that_is_gone_is_nothing() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    assert PeakMemory([gone.pid]).sample() == 0


@pytest.fixture(scope="module")
def lived(outcome: Outcome) -> Outcome:
    return replace(outcome, day=observations.day())


def test_a_day_is_on_the_page_with_its_quarters_targets_cycles_and_plots(lived: Outcome) -> None:
    page = render(lived)
    reader = read(page)

    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert all(reference[1:] in reader.ids for reference in reader.references)
    for name in ("Cost of 1,000 requests by quarter", "Share right by quarter", "Seconds of waiting by quarter"):
        assert page.count(name) == 1
    assert "Cycle after quarter 1" in page
    assert "from 0 % to 1 %" in page
    assert page.count("reached") + page.count("missed") == len(lived.day.targets)  # type: ignore[union-attr]
    assert "In quarter 2 of the day" in page


def test_the_terminal_tells_the_day_too(lived: Outcome) -> None:
    text = printed(lived, width=120)

    assert "The day, against the teacher alone" in text
    assert "missed: cost below always-teacher, last quarter" in text or "reached: cost below always-teacher, last quarter" in text
    assert "cycle after quarter 1, 5:00 min" in text


def test_a_demo_without_a_day_says_nothing_of_one(outcome: Outcome, page: str) -> None:
    assert outcome.to_dict()["day"] is None
    assert "Cycle after quarter" not in page
    assert "The day" not in printed(outcome)


def test_the_day_is_part_of_the_json_contract(lived: Outcome) -> None:
    day = json.loads(json.dumps(lived.to_dict(), allow_nan=False))["day"]

    assert {"quarters", "cycles", "decisions", "targets", "teacher_seconds", "teacher_error_rate"} <= day.keys()
    assert {"saved", "quality", "latency", "served", "alone", "mix", "share_repeated"} <= day["quarters"][0].keys()
    assert {"share", "by_students", "by_cache", "by_escalations", "by_checks"} <= day["quarters"][0]["saved"].keys()
