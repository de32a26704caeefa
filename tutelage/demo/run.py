"""The demo: real processes, real traffic over HTTP, one evolution cycle, unseen traffic, a report of what was measured.

It refuses to decide or to compute anything itself: routing, gate and report are the product's own.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tutelage.demo import installation, observed, recording
from tutelage.demo import outcome as outcomes
from tutelage.demo.client import send
from tutelage.demo.console import Progress, print_report
from tutelage.demo.memory import PeakMemory
from tutelage.demo.outcome import NextStep, Prices, Run, Teacher
from tutelage.demo.schedule import Day
from tutelage.demo.traffic import Traffic, default_traffic, read_traffic
from tutelage.fleet.local import Local
from tutelage.settings import Home, RoutingSettings, load

CONCURRENCY = 32
PER_DOMAIN = 900
UNSEEN_PER_DOMAIN = 80
VERSIONS = ("tutelage", "torch", "transformers", "peft", "bitsandbytes", "prefect", "mlflow", "dvc", "bentoml", "fastapi", "granian")


def demo(
    home: Home, *, traffic: Sequence[Path] | None, report: Path | None, seed: int, per_domain: int | None, config: Path | None = None
) -> int:
    """Run the demo; exit status 0 when a report was written.

    Raises:
        TrafficUnreadable: a row of the user's log cannot be read; nothing was started.
        EngineFailed: a process did not start; the message names its log.
    """
    started = time.monotonic()
    with Progress() as progress:
        planned = _plan(traffic, seed, per_domain, progress)
        file = home.folder("demo") / "recording.jsonl"
        recording.write((*planned.before, *planned.after), file)
        configuration = installation.configure(home, file, source=config)
        local = Local(home, config_dir=configuration, host="127.0.0.1", port=installation.free_port(8080), workers=1, say=progress.say)
        with local, PeakMemory([os.getpid(), *installation.postmaster(home)], interval=3.0) as memory:
            (customer,) = installation.customers(home, local, "demo")
            with progress.stage("traffic before", total=len(planned.before)) as stage:
                before = asyncio.run(send(local.url, customer.key, planned.before, stage, at_once=CONCURRENCY, feedback_seed=seed))
            installation.evolve(local, customer.name, progress)
            with progress.stage("unseen traffic after", total=len(planned.after)) as stage:
                after = asyncio.run(send(local.url, customer.key, planned.after, stage, at_once=CONCURRENCY))
            records = asyncio.run(observed.read(local.engines.database_url, customer.tenant_id))
        answers = [observed.answered(sent, "before", records.rows) for sent in before]
        answers += [observed.answered(sent, "after", records.rows) for sent in after]
        trained = observed.trained(before, records, records.versions)
        run = described(planned, home, local, memory, time.monotonic() - started)
    result = outcomes.summarise(answers, trained, run)
    write(result, report or home.folder("demo") / "report.json")
    print_report(result)
    return 0


def described(planned: Traffic | Day, home: Home, local: Local, memory: PeakMemory, seconds: float) -> Run:
    """What the report says of a run beside its answers."""
    return Run(
        wall_seconds=seconds,
        peak_rss_mb=memory.peak_mb,
        memory_measure=memory.measure,
        source=planned.source,
        learnable=planned.learnable,
        teacher=Teacher(installation.TEACHER, "recorded"),
        prices=Prices(installation.PRICE.input_per_mtok, installation.PRICE.output_per_mtok, local.tier.core_hour_usd),
        threshold=load(RoutingSettings, local.config_dir).threshold,
        versions={name: version(name) for name in VERSIONS},
        notes=planned.notes,
        next_steps=(
            NextStep(f"tutelage serve --home {home.root}", f"the gateway again, at {local.url}/v1: the promoted students keep serving"),
            NextStep(f"tutelage ui --home {home.root}", "Prefect (the cycle, its artifacts) and MLflow (every version with its evidence)"),
            NextStep(f'eval "$(tutelage env --home {home.root})"; bentoml list', "the Bentos of the promoted students"),
            NextStep(f"tutelage status --home {home.root}", "who answers which domain, the gaps, the spend"),
        ),
    )


def write(result: outcomes.Outcome, target: Path) -> None:
    """The report as JSON, and the page beside it."""
    from tutelage.demo.page import render

    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    page = target.with_suffix(".html")
    page.write_text(render(result))
    print(f"report: {target.resolve()} and {page.resolve()}")


def _plan(traffic: Sequence[Path] | None, seed: int, per_domain: int | None, progress: Progress) -> Traffic:
    if traffic:
        return read_traffic(traffic, seed=seed, after_share=0.2)
    progress.say("making the default traffic from reasoning-gym")
    count = per_domain or PER_DOMAIN
    return default_traffic(seed=seed, per_domain_before=count, per_domain_after=min(UNSEEN_PER_DOMAIN, count))
