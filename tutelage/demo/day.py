"""`tutelage demo --day`: a day of drifting traffic over HTTP, evolution cycles between its quarters, the teacher alone beside it.

After every quarter its requests are sent again to the teacher alone, by a tenant that learns nothing, and the report of the day so far is
written: a run that is cut off has told what it saw. It refuses to compute figures (`quarters`, `outcome`) and to decide anything.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tutelage.demo import installation, observed, quarters, recording, run
from tutelage.demo import outcome as outcomes
from tutelage.demo.client import Sent, send
from tutelage.demo.console import Progress, print_report
from tutelage.demo.installation import Customer, Cycled
from tutelage.demo.memory import PeakMemory
from tutelage.demo.observed import Records
from tutelage.demo.outcome import Outcome, Run, Teacher
from tutelage.demo.quarters import Cycle, Decided, Observed, Taught
from tutelage.demo.schedule import Day, default_day, read_day, repeated
from tutelage.fleet.local import Local
from tutelage.settings import Home

PER_QUARTER = 1000
AT_ONCE = 4
ALONE_AT_ONCE = 16  # a recording computes nothing, so these do not wait for each other
TEACHER_SECONDS = 0.5
TEACHER_ERRORS = 0.05  # of the generated day; a log's teacher is as right as the log
ALONE = {"x-tutelage-strategy": "always-teacher", "x-tutelage-cache": "bypass"}
SETTLE_SECONDS = 3.0  # until what is checked after the reply is on record
# A cycle must end before the next quarter begins, and a day's training has a budget (core-seconds): most needed gaps first.
EVOLVE = {"max_students": 2, "training_seconds": 200, "training_seconds_per_day": 2400}
FINETUNE = {"budget_tokens": 18_000, "least_examples": 760}


@dataclass
class Diary:
    """The day as it was lived: for each quarter when it began, its requests, and the teacher's; the cycles, and when each began."""

    began: list[datetime] = field(default_factory=list)
    served: list[list[Sent]] = field(default_factory=list)
    alone: list[list[Sent]] = field(default_factory=list)
    cycles: list[tuple[datetime, Cycled]] = field(default_factory=list)

    @property
    def sent(self) -> list[Sent]:
        return [one for quarter in self.served for one in quarter]

    def quarter_at(self, moment: datetime) -> int:
        """The quarter (from 0) that had begun last; what comes before the first counts for it."""
        return max(bisect_right(self.began, moment) - 1, 0)


def demo_day(
    home: Home, *, traffic: Sequence[Path] | None, report: Path | None, seed: int, per_quarter: int | None, config: Path | None = None
) -> int:
    """Run the day; exit status 0 when its report was written.

    Raises:
        TrafficUnreadable: a row of the user's log cannot be read; nothing was started.
        EngineFailed: a process did not start, or a cycle failed; the message names its log.
    """
    started = time.monotonic()
    target = report or home.folder("demo") / "day.json"
    with Progress() as progress:
        planned, errors = _plan(traffic, seed, per_quarter, progress)
        file = home.folder("demo") / "day-recording.jsonl"
        recording.write(planned.items, file, error_rate=errors, seed=seed)
        changes = {} if config else {"evolve": EVOLVE, "finetune": FINETUNE}
        configuration = installation.configure(home, file, source=config, delay_seconds=TEACHER_SECONDS, **changes)
        local = Local(home, config_dir=configuration, host="127.0.0.1", port=installation.free_port(8080), workers=1, say=progress.say)
        with local, PeakMemory([os.getpid(), *installation.postmaster(home)], interval=3.0) as memory:
            day, alone = installation.customers(home, local, "day", "day-teacher-alone")
            diary = Diary()
            for number, items in enumerate(planned.quarters):
                if number:
                    diary.cycles.append((datetime.now(UTC), installation.evolve(local, day.name, progress, title=f"cycle {number}")))
                _live(diary, local, day, alone, items, number, seed, progress)
                described = _described(planned, errors, home, local, memory, time.monotonic() - started)
                outcome = _so_far(diary, planned, errors, described, local, day, alone)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(outcome.to_dict(), indent=2) + "\n")
    run.write(outcome, target)
    print_report(outcome)
    return 0


def _plan(traffic: Sequence[Path] | None, seed: int, per_quarter: int | None, progress: Progress) -> tuple[Day, float]:
    """The day, and the share of its prompts on which the teacher is wrong."""
    if traffic:
        return read_day(traffic), 0.0
    progress.say("making the day's traffic from reasoning-gym")
    return default_day(seed=seed, per_quarter=per_quarter or PER_QUARTER), TEACHER_ERRORS


def _live(
    diary: Diary, local: Local, day: Customer, alone: Customer, items: Sequence[Any], number: int, seed: int, progress: Progress
) -> None:
    """One quarter: its requests, then the same to the teacher alone."""
    diary.began.append(datetime.now(UTC))
    with progress.stage(f"quarter {number + 1}", total=len(items)) as stage:
        diary.served.append(asyncio.run(send(local.url, day.key, items, stage, at_once=AT_ONCE, feedback_seed=seed + number)))
    with progress.stage(f"quarter {number + 1}, teacher alone", total=len(items)) as stage:
        diary.alone.append(asyncio.run(send(local.url, alone.key, items, stage, at_once=ALONE_AT_ONCE, headers=ALONE)))
    time.sleep(SETTLE_SECONDS)


def _described(planned: Day, errors: float, home: Home, local: Local, memory: PeakMemory, seconds: float) -> Run:
    told = f" It answers after {1000 * TEACHER_SECONDS:.0f} ms, which was chosen beforehand as well."
    if errors:
        told += f" On {errors:.0%} of the prompts, drawn beforehand, it gives another prompt's answer; on all others the right one."
    described = run.described(planned, home, local, memory, seconds)
    return replace(described, teacher=Teacher(installation.TEACHER, "recorded", told))


def _so_far(diary: Diary, planned: Day, errors: float, described: Run, local: Local, day: Customer, alone: Customer) -> Outcome:
    url = local.engines.database_url
    records, control = asyncio.run(observed.read(url, day.tenant_id)), asyncio.run(observed.read(url, alone.tenant_id))
    seen = _seen(diary, planned, records, control)
    taught = _taught(diary, records)
    found = quarters.day(
        seen, _cycles(diary, taught), _decided(diary, records, taught),
        at_once=AT_ONCE, alone_at_once=ALONE_AT_ONCE, teacher_seconds=TEACHER_SECONDS, teacher_error_rate=errors,
    )  # fmt: skip
    answers = [*seen[-1].alone, *seen[-1].served]
    result = outcomes.summarise(answers, observed.trained(diary.sent, records, _in_charge(records)), described)
    training = outcomes.training_of(answers, [one.trained for one in taught], described.prices)
    return replace(result, day=found, training=training, method=outcomes.METHOD | quarters.METHOD)


def _seen(diary: Diary, planned: Day, records: Records, control: Records) -> list[Observed]:
    checks = [0.0] * len(diary.began)
    for moment, microusd in records.shadows:
        checks[diary.quarter_at(moment)] += microusd / 1e6
    repeats = repeated(planned.quarters)
    return [
        Observed(
            tuple(observed.answered(one, "after", records.rows) for one in served),
            tuple(observed.answered(one, "before", control.rows) for one in alone),
            repeats[number],
            checks[number],
        )
        for number, (served, alone) in enumerate(zip(diary.served, diary.alone, strict=True))
    ]


def _taught(diary: Diary, records: Records) -> list[Taught]:
    """Every version, with the first thing that was decided on it."""
    tasks = observed.tasks_of(diary.sent, records.rows)
    first: dict[tuple[str, int], Mapping[str, Any]] = {}
    for line in records.promotions:
        first.setdefault((line["student"], line["version"]), line)
    judged = [v for v in records.versions if (v["student"], v["version"]) in first]
    return [
        Taught(observed.student(v, tasks.get(v["domain"], v["domain"])), v["version"], line["action"], line["reason"], v["created_at"])
        for v in sorted(judged, key=lambda v: v["created_at"])
        for line in [first[v["student"], v["version"]]]
    ]


def _cycles(diary: Diary, taught: Sequence[Taught]) -> list[Cycle]:
    began = [moment for moment, _ in diary.cycles]
    of = [bisect_right(began, one.created_at) - 1 for one in taught]
    return [
        Cycle(number + 1, cycled.seconds, cycled.stages, tuple(one for one, at in zip(taught, of, strict=True) if at == number))
        for number, (_, cycled) in enumerate(diary.cycles)
    ]


def _decided(diary: Diary, records: Records, taught: Sequence[Taught]) -> list[Decided]:
    """The ledger's lines beyond the first on each version: what the watch decided as verdicts came in."""
    tasks = observed.tasks_of(diary.sent, records.rows)
    met: set[tuple[str, int]] = set()
    found = []
    for line in records.promotions:
        version = (line["student"], line["version"])
        if version in met:
            number = diary.quarter_at(line["created_at"]) + 1
            task = tasks.get(line["domain"], line["domain"])
            found.append(Decided(number, task, line["action"], *version, line["reason"]))
        met.add(version)
    return found


def _in_charge(records: Records) -> list[Mapping[str, Any]]:
    """Of each student the version that answers now, else its newest."""
    ends = {line["domain"]: (line["champion_student"], line["champion_version"]) for line in records.promotions}
    newest = {v["student"]: v for v in sorted(records.versions, key=lambda v: int(v["version"]))}
    return [
        next((v for v in records.versions if (v["student"], v["version"]) == ends.get(last["domain"])), last) for last in newest.values()
    ]
