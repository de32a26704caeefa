"""One student's way: spawned, taught, examined. Every stage is a process started through DVC in the student's own folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.traffic import export
from flows.workshop import Cycle, connected, run_stage, tell
from tutelage.evolution.gaps import Gap
from tutelage.evolution.spawning import student_name
from tutelage.stores import registry

CHAMPIONS = "champion/predictions.jsonl"  # what the domain's champion answered to the candidate's held-out items that were new to it


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
    """Register the next version of the domain's student and write its folder: data, settings, pipeline."""
    name = student_name(cycle.tenant_name, gap.domain)
    async with connected(cycle) as pool:
        version = await registry.spawn(
            pool,
            tenant_id=cycle.tenant_id,
            domain=gap.domain,
            student=name,
            cycle_id=cycle.id,
            folder=str(cycle.state.students / name / "v{version}"),
        )
    folder = cycle.state.students / name / f"v{version}"
    if not (cycle.state.students / ".dvc").exists():
        await run_stage(cycle, "pipeline", ["-m", "dvc", "init", "--no-scm", "--quiet"], cwd=cycle.state.students)
    student = Student(name, version, gap.domain, folder)
    requests = await export(cycle, gap.domain, folder / "interactions.jsonl")
    arguments = ["-m", "training.pipeline", "--student", str(folder), "--settings", str(cycle.config_dir)]
    frozen = await _held_out(cycle, student)
    await run_stage(cycle, "pipeline", [*arguments, *(["--frozen", *frozen] if frozen else [])], student=name)
    tell("spawn", f"version {version} from {requests} requests", student=name)
    return replace(student, requests=requests)


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
    curve = [json.loads(line) for line in (student.folder / "curve.jsonl").read_text().splitlines()]
    await acreate_markdown_artifact(key=f"curve-{student.name}", markdown=_curve(student, curve))


@task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5, task_run_name="evaluate-{student.name}")
async def evaluate(cycle: Cycle, student: Student) -> None:
    """Examine the adapter on frozen held-out items and calibrate its confidence."""
    await _reproduce(cycle, "evaluate", student)
    await _ask_champion(cycle, student)


async def _ask_champion(cycle: Cycle, student: Student) -> None:
    """Who answers the domain now is asked the held-out items that it was never asked: knowing what is new must count."""
    async with connected(cycle) as pool:
        pointer = await registry.pointer(pool, cycle.tenant_id, student.domain)
        versions = await registry.list_versions(pool)
    folder = next((Path(v["path"]) for v in versions if (v["student"], v["version"]) == (pointer.student, pointer.version)), None)
    if folder is None or not unasked(student.folder, folder):
        return
    asked = student.folder / "champion"
    arguments = ["-m", "training.evaluate", "--adapter", str(folder / "adapter"), "--data", str(asked / "unasked.jsonl")]
    arguments += ["--report", str(asked / "report.json"), "--predictions", str(student.folder / CHAMPIONS)]
    await run_stage(cycle, "evaluate", [*arguments, "--config", str(asked / "evaluate.yaml")], student=student.name)


def unasked(candidate: Path, champion: Path) -> int:
    """Write the candidate's held-out items that the champion's evaluation did not have, and settings to ask it; how many there are."""
    predictions = champion / "predictions.jsonl"
    known = {json.loads(line)["prompt"] for line in predictions.read_text().splitlines()} if predictions.exists() else set()
    lines = (candidate / "curated" / "test.jsonl").read_text().splitlines(keepends=True)
    fresh = [line for line in lines if json.loads(line)["messages"][-2]["content"] not in known]
    target = candidate / "champion"
    target.mkdir(exist_ok=True)
    (target / "unasked.jsonl").write_text("".join(fresh))
    settings = yaml.safe_load((candidate / "evaluate.yaml").read_text()) | {"untrained_items": 0}
    (target / "evaluate.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
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
