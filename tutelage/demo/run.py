"""The demo: real processes, real traffic over HTTP, one evolution cycle, unseen traffic, a report of what was measured.

It refuses to decide or to compute anything itself: routing, gate and report are the product's own.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tutelage.demo import outcome as outcomes
from tutelage.demo.console import Progress, print_report
from tutelage.demo.memory import PeakMemory
from tutelage.demo.outcome import Answered, CurvePoint, NextStep, Prediction, Prices, Run, Teacher, Trained
from tutelage.demo.traffic import Item, Traffic, default_traffic, read_traffic
from tutelage.errors import EngineFailed
from tutelage.fleet import engines, processes
from tutelage.fleet.local import Local
from tutelage.operations import add_tenant
from tutelage.scoring import matches
from tutelage.settings import CHECKOUT, Home, Price, RoutingSettings, TierSettings, load
from tutelage.stores import interactions, registry, tenants
from tutelage.stores.database import open_pool

TEACHER = "recorded-teacher"
PRICE = Price(input_per_mtok=2.50, output_per_mtok=10.00)  # gpt-4o list price
CONCURRENCY = 32
FEEDBACK_SHARE = 0.5
PER_DOMAIN = 900
UNSEEN_PER_DOMAIN = 80
DECISIONS = {
    "ta": "promoted", "teacher": "promoted", "student": "kept_student", "challenger": "kept_student", "waiting": "kept_student",
    "refused": "refused",
}  # fmt: skip
VERSIONS = ("tutelage", "torch", "transformers", "peft", "bitsandbytes", "prefect", "mlflow", "dvc", "bentoml", "fastapi", "granian")


@dataclass(frozen=True)
class Sent:
    """One request as its client saw it: the item, the reply's text and headers; `text` None when nobody answered."""

    item: Item
    text: str | None
    headers: dict[str, str]

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")


def demo(home: Home, *, traffic: Sequence[Path] | None, report: Path | None, seed: int, per_domain: int | None) -> int:
    """Run the demo; exit status 0 when a report was written.

    Raises:
        TrafficUnreadable: a row of the user's log cannot be read; nothing was started.
        EngineFailed: a process did not start; the message names its log.
    """
    started = time.monotonic()
    with Progress() as progress:
        planned = _plan(traffic, seed, per_domain, progress)
        _write_config(home, planned)
        local = Local(home, config_dir=home.root / "config", host="127.0.0.1", port=_port(8080), workers=1, say=progress.say)
        with local, PeakMemory([os.getpid(), *_postmaster(home)], interval=3.0) as memory:
            key, tenant_id, tenant_name = asyncio.run(_tenant(home, local))
            before = asyncio.run(_send(local.url, key, planned.before, "before", progress, feedback_seed=seed))
            _evolve(home, tenant_name, progress)
            local.reconcile()
            after = asyncio.run(_send(local.url, key, planned.after, "after", progress, feedback_seed=None))
            answers, trained = asyncio.run(_collect(local, tenant_id, before, after))
        run = _run(planned, home, local, memory, time.monotonic() - started)
    result = outcomes.summarise(answers, trained, run)
    target = report or home.folder("demo") / "report.json"
    _write(result, target)
    print_report(result)
    return 0


def _plan(traffic: Sequence[Path] | None, seed: int, per_domain: int | None, progress: Progress) -> Traffic:
    if traffic:
        return read_traffic(traffic, seed=seed, after_share=0.2)
    progress.say("making the default traffic from reasoning-gym")
    count = per_domain or PER_DOMAIN
    return default_traffic(seed=seed, per_domain_before=count, per_domain_after=min(UNSEEN_PER_DOMAIN, count))


def _write_config(home: Home, planned: Traffic) -> None:
    """The checkout's configuration, with the recording as the only teacher; kept, so that a later `tutelage serve` finds it."""
    recording = home.folder("demo") / "recording.jsonl"
    with recording.open("w") as file:
        for item in (*planned.before, *planned.after):
            file.write(json.dumps({"messages": item.messages(), "answer": item.label}, ensure_ascii=False) + "\n")
    target = home.folder("config")
    for source in (CHECKOUT / "configs").glob("*.yaml"):
        shutil.copyfile(source, target / source.name)
    teacher = {"name": TEACHER, "tier": "teacher", "kind": "recorded", "path": str(recording), "price": PRICE.model_dump()}
    (target / "models.yaml").write_text("# written by `tutelage demo`\n" + yaml.safe_dump({"models": [teacher]}, sort_keys=False))
    tier = load(TierSettings, CHECKOUT / "configs").model_dump() | {"port": _port(3300)}
    (target / "tier.yaml").write_text("# written by `tutelage demo`\n" + yaml.safe_dump(tier, sort_keys=False))


async def _tenant(home: Home, local: Local) -> tuple[str, str, str]:
    """A tenant of this run's own, so that a second demo in the same home starts from nothing again: (key, id, name)."""
    pool = await open_pool(local.engines.database_url, size=1)
    try:
        taken = {tenant.name for tenant in await tenants.list_tenants(pool)}
        name = next(name for name in ("demo", *(f"demo-{n}" for n in range(2, 10_000))) if name not in taken)
        made = await add_tenant(pool, home.secret("pepper"), name=name, tier="enterprise")
        return made["key"], made["tenant_id"], name
    finally:
        await pool.close()


async def _send(url: str, key: str, items: Sequence[Item], phase: str, progress: Progress, *, feedback_seed: int | None) -> list[Sent]:
    """Send the items as a client would, with the official client; where asked, give a user's feedback on a share of the answers."""
    import random

    import httpx
    import openai

    gate, chance = asyncio.Semaphore(CONCURRENCY), random.Random(feedback_seed)
    told = {i for i in range(len(items)) if feedback_seed is not None and chance.random() < FEEDBACK_SHARE}
    title = {"before": "traffic before", "after": "unseen traffic after"}[phase]
    with progress.stage(title, total=len(items)) as stage:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=2, timeout=300) as client, httpx.AsyncClient() as http:

            async def one(index: int, item: Item) -> Sent:
                async with gate:
                    sent = await _ask(client, item)
                    if index in told and sent.text is not None:
                        said = {"request_id": sent.request_id, "score": float(matches(sent.text, item.label)), "label": item.label}
                        (await http.post(f"{url}/v1/feedback", json=said, headers={"authorization": f"Bearer {key}"})).raise_for_status()
                stage.advance()
                return sent

            return list(await asyncio.gather(*(one(i, item) for i, item in enumerate(items))))


async def _ask(client: Any, item: Item) -> Sent:
    import openai

    try:
        raw = await client.chat.completions.with_raw_response.create(model="auto", messages=item.messages(), temperature=0)
    except openai.APIStatusError as refused:
        return Sent(item, None, dict(refused.response.headers))
    return Sent(item, raw.parse().choices[0].message.content or "", dict(raw.headers))


def _evolve(home: Home, tenant: str, progress: Progress) -> None:
    """One cycle as `tutelage evolve` runs it, its progress shown. Raises EngineFailed when it fails."""
    file = home.run / "progress.jsonl"
    file.write_text("")
    command = processes.python("-m", "flows.evolve", "--tenant", tenant, "--config", str(home.root / "config"))
    with (
        progress.stage("evolution cycle", total=None) as stage,
        processes.run(home, "evolve", command, environment={"TUTELAGE_PROGRESS": str(file)}) as process,
        file.open() as lines,
    ):
        while True:
            ended = process.poll() is not None
            for line in lines:
                fact = json.loads(line)
                stage.note(fact["stage"], fact["text"], student=fact["student"], done=fact["done"], total=fact["total"])
            if ended:
                break
            time.sleep(0.3)
    if process.returncode:
        raise EngineFailed(f"the evolution cycle failed; read {home.logs / 'evolve.log'}")


async def _collect(local: Local, tenant_id: str, before: Sequence[Sent], after: Sequence[Sent]) -> tuple[list[Answered], list[Trained]]:
    """What the database and the students' folders know of this run."""
    pool = await open_pool(local.engines.database_url, size=2)
    try:
        rows = await interactions.read_interactions(pool, tenant_id, limit=1_000_000)
        versions = [v for v in await registry.list_versions(pool) if v["tenant_id"] == tenant_id]
    finally:
        await pool.close()
    by_id = {row["request_id"]: row for row in rows}
    answers = [_answered(sent, "before", by_id) for sent in before] + [_answered(sent, "after", by_id) for sent in after]
    return answers, _trained(before, by_id, versions)


def _answered(sent: Sent, phase: Any, rows: dict[str, dict[str, Any]]) -> Answered:
    row = rows.get(sent.request_id)
    correct = sent.text is not None and matches(sent.text, sent.item.label)
    if row is None:
        return Answered(sent.item.task, phase, correct, 0.0, None)
    tried = row["attempts"][0] if row["attempts"] else None
    return Answered(
        task=sent.item.task,
        phase=phase,
        correct=correct,
        # the header has fractions of a micro-dollar, which the ledger rounds
        cost_usd=float(sent.headers.get("x-tutelage-cost-usd", row["cost_microusd"] / 1e6)),
        tier=row["tier"],
        cached=row["cache"].startswith("hit"),
        confidence=tried.confidence if tried else None,
        student=tried.model if tried else None,
        escalated=bool(tried and not tried.accepted),
        student_correct=matches(tried.answer, sent.item.label) if tried else None,
    )


def _trained(before: Sequence[Sent], rows: dict[str, dict[str, Any]], versions: Sequence[dict[str, Any]]) -> list[Trained]:
    """One record a student, under the task that most of its domain's requests came from; tasks without a student have one too."""
    tasks: dict[str, Counter[str]] = {}
    for sent in before:
        domain = (rows.get(sent.request_id) or {}).get("domain")
        if domain is not None:
            tasks.setdefault(domain, Counter())[sent.item.task] += 1
    found = [_student(v, tasks[v["domain"]].most_common(1)[0][0]) for v in versions if v["domain"] in tasks and v["status"] in DECISIONS]
    for task in sorted({sent.item.task for sent in before} - {record.task for record in found}):
        reason = "no gap of this task was worth a student; see: tutelage gaps"
        found.append(Trained(task, None, "refused", reason, 0, 0, 0, None, None))
    return found


def _student(version_row: dict[str, Any], task: str) -> Trained:
    folder, evidence = Path(version_row["path"]), version_row["evidence"]
    report = json.loads((folder / "report.json").read_text())
    untrained = report["untrained"]
    return Trained(
        task=task,
        student=version_row["student"],
        decision=DECISIONS[version_row["status"]],  # type: ignore[arg-type]
        reason=version_row["reason"],
        n_train=evidence["n_train"],
        n_test=report["n"],
        majority_correct=report["majority_n"],
        before_correct=untrained["correct"] if untrained["n"] else None,
        before_n=untrained["n"] or None,
        after_correct=report["correct"],
        predictions=tuple(
            Prediction(p["probability"], p["correct"]) for p in _rows(folder / "predictions.jsonl") if p["probability"] is not None
        ),
        curve=tuple(CurvePoint(r["step"], r["loss"], r.get("val_loss"), r.get("val_accuracy")) for r in _rows(folder / "curve.jsonl")),
        core_seconds=evidence.get("core_seconds", 0.0),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(planned: Traffic, home: Home, local: Local, memory: PeakMemory, seconds: float) -> Run:
    return Run(
        wall_seconds=seconds,
        peak_rss_mb=memory.peak_mb,
        memory_measure=memory.measure,
        source=planned.source,
        learnable=planned.learnable,
        teacher=Teacher(TEACHER, "recorded"),
        prices=Prices(PRICE.input_per_mtok, PRICE.output_per_mtok, local.tier.core_hour_usd),
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


def _write(result: outcomes.Outcome, target: Path) -> None:
    from tutelage.demo.page import render

    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    page = target.with_suffix(".html")
    page.write_text(render(result))
    print(f"report: {target.resolve()} and {page.resolve()}")


def _port(usual: int) -> int:
    """The usual port, or a free one when something else has it."""
    for port in (usual, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise EngineFailed("no free port on 127.0.0.1")


def _postmaster(home: Home) -> list[int]:
    pid = engines.postmaster(home)
    return [pid] if pid else []
