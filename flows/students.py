"""One student's way: spawned, taught, examined. Every stage is a process started through DVC in the student's own folder."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.traffic import export
from flows.workshop import Cycle, connected, load_adapter, run_stage, tell
from tutelage.evolution.gaps import EvolveSettings, Gap
from tutelage.evolution.spawning import student_name, teachers_of
from tutelage.fleet.local import BASE
from tutelage.fleet.tiers import Wanted
from tutelage.settings import ModelsSettings, load
from tutelage.stores import datasets, registry

# What the domain's champion answered to the candidate's held-out items that were new to it, and the candidate to the champion's.
CHAMPIONS, EARLIER = "champion/predictions.jsonl", "earlier/predictions.jsonl"


@dataclass(frozen=True)
class Student:
    """One version of a student in this cycle. `requests`: how many of its domain it could learn from."""

    name: str
    version: int
    domain: str
    folder: Path
    requests: int = 0

    def report(self) -> dict[str, Any]:
        """What `training.evaluate` measured."""
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return report

    def manifest(self) -> dict[str, Any]:
        """What `training.finetune` made."""
        manifest: dict[str, Any] = json.loads((self.folder / "adapter" / "manifest.json").read_text())
        return manifest


@task(cache_policy=NO_CACHE, task_run_name="spawn-{gap.domain}")
async def spawn(cycle: Cycle, gap: Gap) -> Student:
    """Register the next version of the domain's student, loadable and in the teacher's shadow at once; then what it learns from."""
    student = await begin(cycle, gap.domain)
    if not (cycle.state.students / ".dvc" / "config").exists():  # none yet, or one whose making was cut off
        await run_stage(cycle, "pipeline", ["-m", "dvc", "init", "--no-scm", "--force", "--quiet"], cwd=cycle.state.students)
    requests = await export(cycle, gap.domain, student.folder / "interactions.jsonl")
    arguments = ["-m", "training.pipeline", "--student", str(student.folder), "--settings", str(cycle.config_dir)]
    frozen = await _held_out(cycle, student)
    await run_stage(cycle, "pipeline", [*arguments, *(["--frozen", *frozen] if frozen else [])], student=student.name)
    tell("spawn", f"version {student.version} from {requests} requests", student=student.name)
    return replace(student, requests=requests)


async def begin(cycle: Cycle, domain: str) -> Student:
    """From the decision to a registered version with a fresh adapter and its teachers, on the tier and in routing as a shadow: no process
    is started for it and no torch imported, so it takes a fraction of a second.

    Raises:
        PlanLimitReached: the tenant has as many students as it may, or the domain needs every version it keeps.
    """
    from inference import fresh

    began, name = time.monotonic(), student_name(cycle.tenant_name, domain)
    settings, models = load(EvolveSettings, cycle.config_dir), load(ModelsSettings, cycle.config_dir)
    async with connected(cycle) as pool:
        now = await registry.pointer(pool, cycle.tenant_id, domain)
        teachers = teachers_of(domain, models.models, graduate=now.student if now.tier == "teacher" else None)
        version = await registry.spawn(
            pool,
            tenant_id=cycle.tenant_id,
            domain=domain,
            student=name,
            cycle_id=cycle.id,
            folder=str(cycle.state.students / name / "v{version}"),
            most=settings.max_models_per_domain,
            teachers=teachers,
        )
        student = Student(name, version, domain, cycle.state.students / name / f"v{version}")
        adapter = registry.adapter_name(name, version)
        digest = fresh.write(cycle.state.models / BASE, student.folder / registry.FRESH, name=adapter)
        await registry.begin_with(pool, name, version, digest=digest)
    shown = load_adapter(cycle.state, cycle.config_dir, Wanted(adapter, str(student.folder / registry.FRESH), digest))
    told = f"version {version} registered{' and loaded' if shown else ''} after {time.monotonic() - began:.2f} s"
    tell("begin", f"{told}; taught by {', '.join(teachers) or 'nobody yet'}", student=name)
    return student


@task(cache_policy=NO_CACHE, task_run_name="curate-{student.name}")
async def curate(cycle: Cycle, student: Student) -> None:
    """Clean, split and freeze the examples."""
    await _reproduce(cycle, "curate", student)
    report = json.loads((student.folder / "curated" / "report.json").read_text())
    await acreate_markdown_artifact(key=f"curated-{student.name}", markdown=f"```json\n{json.dumps(report, indent=2)}\n```")


@task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5, task_run_name="distill-{student.name}")
async def distill(cycle: Cycle, student: Student) -> None:
    """Turn what was kept into what is learned: targets, rationales, weights and preferences, as the strategy says."""
    await _reproduce(cycle, "distill", student)
    report = json.loads((student.folder / "distilled" / "report.json").read_text())
    await acreate_markdown_artifact(key=f"distilled-{student.name}", markdown=f"```json\n{json.dumps(report, indent=2)}\n```")


@task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5, task_run_name="finetune-{student.name}")
async def finetune(cycle: Cycle, student: Student) -> None:
    """Train a fresh adapter on the targets; a probe ends it early when there is nothing to learn."""
    await _reproduce(cycle, "finetune", student)
    curve = datasets.read_curve(student.folder / "curve.csv")
    await acreate_markdown_artifact(key=f"curve-{student.name}", markdown=_curve(student, curve))


@task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5, task_run_name="evaluate-{student.name}")
async def evaluate(cycle: Cycle, student: Student) -> None:
    """Examine the adapter on frozen held-out items and calibrate its confidence."""
    await _reproduce(cycle, "evaluate", student)
    await _ask_each_other(cycle, student)


async def _ask_each_other(cycle: Cycle, student: Student) -> None:
    """Candidate and champion answer each other's held-out items: what is new must count for who knows it, and what was before must too."""
    async with connected(cycle) as pool:
        pointer = await registry.pointer(pool, cycle.tenant_id, student.domain)
        versions = await registry.list_versions(pool)
    champion = next((Path(v["path"]) for v in versions if (v["student"], v["version"]) == (pointer.student, pointer.version)), None)
    if champion is None:
        return
    for asked, owner, answers in ((champion, student.folder, CHAMPIONS), (student.folder, champion, EARLIER)):
        target = (student.folder / answers).parent
        if unasked(owner, asked, target, settings=student.folder / "evaluate.yaml"):
            arguments = ["-m", "training.evaluate", "--adapter", str(asked / "adapter"), "--data", str(target / "unasked.jsonl")]
            arguments += ["--report", str(target / "report.json"), "--predictions", str(student.folder / answers)]
            await run_stage(cycle, "evaluate", [*arguments, "--config", str(target / "evaluate.yaml")], student=student.name)


def unasked(owner: Path, asked: Path, target: Path, *, settings: Path) -> int:
    """Write to `target` the owner's held-out items that another version's evaluation did not have, and settings to ask it; how many."""
    predictions = asked / "predictions.jsonl"
    known = {json.loads(line)["prompt"] for line in predictions.read_text().splitlines()} if predictions.exists() else set()
    items = owner / "curated" / "test.jsonl"
    lines = items.read_text().splitlines(keepends=True) if items.exists() else []  # erased with the tenant they came from
    fresh = [line for line in lines if json.loads(line)["messages"][-2]["content"] not in known]
    target.mkdir(exist_ok=True)
    (target / "unasked.jsonl").write_text("".join(fresh))
    chosen = yaml.safe_load(settings.read_text()) | {"untrained_items": 0}
    (target / "evaluate.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False))
    return len(fresh)


async def _held_out(cycle: Cycle, student: Student) -> list[str]:
    """The held-out files of the tenant's students, of each its newest version that has some: no other student may learn from them."""
    async with connected(cycle) as pool:
        versions = [v for v in await registry.list_versions(pool) if v["tenant_id"] == cycle.tenant_id]
    newest: dict[str, list[str]] = {}
    for version in sorted(versions, key=lambda v: int(v["version"])):
        folder = cycle.state.students / version["student"] / f"v{version['version']}" / "curated"
        files = [str(folder / name) for name in ("test.jsonl", "calibration.jsonl") if (folder / name).exists()]
        if files and folder.parent != student.folder:
            newest[version["student"]] = files
    return [file for files in newest.values() for file in files]


async def _reproduce(cycle: Cycle, stage: str, student: Student) -> None:
    """`dvc repro` up to a stage: what is up to date is not run again, so a retried task resumes where it stopped."""
    await run_stage(cycle, stage, ["-m", "dvc", "repro", stage], cwd=student.folder, student=student.name)


def _curve(student: Student, curve: list[dict[str, Any]]) -> str:
    """The training curve as a table with bars: it is read in a page that shows no pictures of ours."""
    top = max((row["loss"] for row in curve), default=1.0) or 1.0
    shown = [row for i, row in enumerate(curve) if "val_accuracy" in row or i % max(len(curve) // 20, 1) == 0]
    lines = [f"### {student.name} v{student.version}", "", "| step | loss | | held-back right |", "|---:|---:|:---|---:|"]
    for row in shown:
        right = f"{row['val_accuracy']:.2f}" if "val_accuracy" in row else ""
        lines.append(f"| {row['step']} | {row['loss']:.3f} | {'█' * round(24 * row['loss'] / top)} | {right} |")
    return "\n".join(lines)
