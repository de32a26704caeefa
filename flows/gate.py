"""The end of a cycle: judge, register, package, roll out. The rule is `tutelage.evolution.promotion`; here it takes effect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.packing import pack
from flows.students import CHAMPIONS, EARLIER, Student
from flows.workshop import Cycle, connected, load_adapter, run_stage, tell
from tutelage.evolution.canaries import inflated
from tutelage.evolution.evidence import Tally
from tutelage.evolution.outcomes import contest
from tutelage.evolution.promotion import Comparison, Evidence, PromotionSettings, Verdict, compared, confirmed, judge
from tutelage.fleet import processes
from tutelage.fleet.tiers import Wanted
from tutelage.settings import load
from tutelage.stores import evidence as standing
from tutelage.stores import registry
from tutelage.stores.registry import Decision, Pointer

DECISIONS = {"promote": "promoted", "keep": "kept", "refuse": "refused", "challenge": "challenges", "wait": "waits"}
STATUS = {"promote": "ta", "keep": "student", "refuse": "refused", "challenge": "challenger", "wait": "waiting"}
TOLD = {
    "promote": "answers {domain}",
    "keep": "answers {domain} where it is sure",
    "refuse": "refused, nothing changes",
    "challenge": "in shadow: the champion of {domain} goes on answering",
    "wait": "answers nothing of {domain} before a person approves it in MLflow",
}


@dataclass(frozen=True)
class Judged:
    """A student with its evidence and verdict, read against the ledger at `pointer`."""

    student: Student
    evidence: Evidence
    verdict: Verdict
    pointer: Pointer


@task(cache_policy=NO_CACHE, task_run_name="gate-{student.name}")
async def gate(cycle: Cycle, student: Student) -> Judged:
    """Hold the evidence against the floors, and note the verdict with the version."""
    report, manifest = student.report(), student.manifest()
    async with connected(cycle) as pool:
        pointer = await registry.pointer(pool, cycle.tenant_id, student.domain)
        comparison = await _comparison(pool, student, report, pointer)
        evidence = _evidence(report, manifest, comparison, _leaked(student) or _too_good(report))
        evidence = replace(evidence, kept=await _kept(pool, student, report, pointer))
        settings = load(PromotionSettings, cycle.config_dir)
        number, passed = await standing.enrol(pool, student.name, student.version, "ta", year=datetime.now(UTC).year)
        verdict = judge(evidence, settings, needed=settings.needed(number, passed))
        await _note(pool, student, evidence, verdict)
        verdict = confirmed(verdict, settings.approval)
        await registry.complete_version(
            pool,
            student.name,
            student.version,
            status=STATUS[verdict.action],
            awaits=verdict.awaits,
            digest=manifest["adapter_digest"],
            base_fingerprint=manifest["base_fingerprint"],
            calibrator=report["calibrator"],
            evidence=evidence.to_dict() | _cost(student, manifest),
            reason=verdict.reason,
        )
    await acreate_markdown_artifact(key=f"verdict-{student.name}", markdown=card(student, evidence, verdict))
    tell("gate", f"{verdict.action}: {verdict.reason}", student=student.name)
    return Judged(student, evidence, verdict, pointer)


@task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5)
async def register(cycle: Cycle, judged: Sequence[Judged]) -> None:
    """Every candidate becomes an MLflow model version with its evidence; the refused ones too, with their reason. Its aliases follow once
    the ledger has decided (`flows.review`)."""
    jobs = [_job(cycle, j) for j in judged]
    file = cycle.state.folder("run") / f"publish-{cycle.id}.json"
    file.write_text(json.dumps(jobs))
    told = await run_stage(cycle, "publish", ["-m", "training.publish", "--jobs", str(file)])
    published = json.loads(told[told.index("[{") :].splitlines()[0]) if jobs else []
    async with connected(cycle) as pool:
        for j, entry in zip(judged, published, strict=True):
            await registry.complete_version(pool, j.student.name, j.student.version, mlflow_version=str(entry["version"]))
    file.unlink()


@task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5, task_run_name="package-{judged.student.name}")
async def package(cycle: Cycle, judged: Judged) -> None:
    """A student that is promoted, or may be, becomes a Bento that serves on its own: `bentoml serve NAME:VERSION`."""
    student = judged.student
    digest = student.manifest()["adapter_digest"]
    async with connected(cycle) as pool:
        await pack(cycle, pool, student=student.name, version=student.version, folder=student.folder, digest=digest)


@task(cache_policy=NO_CACHE, task_run_name="rollout-{judged.student.name}")
async def roll_out(cycle: Cycle, judged: Judged) -> None:
    """Load the adapter where the tier runs, then move the champion pointer by compare-and-set; a refusal is noted and moves nothing."""
    student, verdict = judged.student, judged.verdict
    if verdict.action not in ("refuse", "wait"):
        name, digest = registry.adapter_name(student.name, student.version), student.manifest()["adapter_digest"]
        if not load_adapter(cycle.state, cycle.config_dir, Wanted(name, str(student.folder / "adapter"), digest)):
            tell("rollout", "no tier runs; it will load the adapter when it starts", student=student.name)
    now = Pointer(judged.pointer.sequence + 1, student.name, student.version, verdict.tier)
    champion = now if verdict.action in ("promote", "keep") else judged.pointer
    begins = None
    if verdict.action == "challenge" and verdict.tier is not None:
        rollout = standing.Rollout(cycle.tenant_id, student.domain, student.name, student.version, 0, verdict.tier)
        begins = partial(standing.begin_rollout, rollout=rollout)
    async with connected(cycle) as pool:
        await registry.decide(
            pool,
            Decision(
                cycle.tenant_id,
                student.domain,
                verdict.action,
                student.name,
                student.version,
                champion,
                verdict.reason,
                judged.evidence.to_dict(),
            ),
            expected=judged.pointer.sequence,
            within=begins,
        )
    tell("rollout", TOLD[verdict.action].format(domain=student.domain), student=student.name)


@task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5)
async def show(cycle: Cycle) -> None:
    """MLflow's aliases follow the ledger; where the reviewer's desk runs beside the gateway, it sees to that."""
    if processes.find(cycle.state, "review") is None:
        await run_stage(cycle, "review", ["-m", "flows.review", "--once", "--config", str(cycle.config_dir)])


def card(student: Student, evidence: Evidence, verdict: Verdict) -> str:
    """What a reviewer needs to decide from, in Markdown."""
    before = "not measured" if evidence.before is None else f"{evidence.before:.3f}"
    rows = {
        "verdict": f"**{verdict.action}**",
        "waits for a person": f"as **{verdict.awaits}**" if verdict.awaits else "no",
        "reason": verdict.reason,
        "held-out items": evidence.n,
        "right": f"{evidence.accuracy:.3f}, 95 % Wilson [{evidence.lower:.3f}, {evidence.upper:.3f}]",
        "untrained base": before,
        "always the majority answer": f"{evidence.majority:.3f}",
        "at least as good as the teacher": f"{evidence.wins} of {evidence.n}",
        "mean calibrated confidence": f"{evidence.confidence:.3f}",
        "calibration error (ECE)": "not measured" if evidence.ece is None else f"{evidence.ece:.3f}",
        "not to be believed": evidence.suspicion or "no sign of it",
        "learnable": f"{evidence.learnable}: {evidence.learnable_reason}",
    }
    head = f"## {student.name} v{student.version}\n\nDomain **{student.domain}**, from {student.requests} requests.\n\n| | |\n|---|---|\n"
    return head + "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items())


def _evidence(report: dict[str, Any], manifest: dict[str, Any], comparison: Comparison | None, suspicion: str | None) -> Evidence:
    untrained = report["untrained"]
    return Evidence(
        n=report["n"],
        correct=report["correct"],
        wins=report["wins"],
        accuracy=report["accuracy"],
        lower=report["wilson95"][0],
        upper=report["wilson95"][1],
        majority=report["majority"],
        confidence=report["mean_confidence"] or 0.0,  # not measured where the probe found the task hopeless
        ece=report["ece"],
        learnable=manifest["learnable"] is not False,  # None: the data were too few for a probe
        learnable_reason=manifest["reason"],
        before=untrained["correct"] / untrained["n"] if untrained["n"] else None,
        comparison=comparison,
        suspicion=suspicion,
    )


def _cost(student: Student, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the version was made from and what that took."""
    metrics = manifest["metrics"]
    return {
        "requests": student.requests,
        "n_train": metrics["examples"],
        "steps": metrics["steps"],
        "core_seconds": metrics["seconds"] * manifest["threads"],
    }


async def _note(pool: Any, student: Student, evidence: Evidence, verdict: Verdict) -> None:
    """Begin the version's evidence with what the held-out items said; live outcomes are added to it."""
    version = (student.name, student.version)
    await standing.add(pool, version, "held-out", evidence.tally)
    if evidence.comparison is not None:
        await standing.add(pool, version, "pairs", evidence.comparison.pairs)
    if verdict.tier == "ta":
        await standing.mark_passed(pool, *version, "ta")


async def _comparison(pool: Any, student: Student, report: dict[str, Any], pointer: Pointer) -> Comparison | None:
    """Candidate and champion on the candidate's held-out items. None without a champion."""
    for version in await registry.list_versions(pool):
        if (version["student"], version["version"]) == (pointer.student, pointer.version):
            folder = Path(version["path"])
            pairs = paired(student.folder, folder)
            return compared(pairs, domain=student.domain, price=_tokens(report), champion_price=_tokens(_report(folder)))
    return None


async def _kept(pool: Any, student: Student, report: dict[str, Any], pointer: Pointer) -> dict[str, Tally]:
    """Candidate and champion on what earlier traffic asked; nothing without a champion."""
    for version in await registry.list_versions(pool):
        if (version["student"], version["version"]) == (pointer.student, pointer.version):
            folder = Path(version["path"])
            return kept(report, _report(folder), student.folder, folder)
    return {}


def kept(report: dict[str, Any], champions: dict[str, Any], candidate: Path, champion: Path) -> dict[str, Tally]:
    """The canaries that both were asked, and the champion's own held-out items, which are of the traffic that it was trained in."""
    return {"canaries": remembered(report, champions), "items of the champion's time": paired_before(candidate, champion)}


def remembered(report: dict[str, Any], champions: dict[str, Any]) -> Tally:
    """Two evaluations' answers to the canaries that both were asked."""
    mine, theirs = (told.get("canaries", {}).get("right", {}) for told in (report, champions))
    return _contested(mine, theirs)


def paired(candidate: Path, champion: Path) -> Tally:
    """Their answers to the candidate's held-out items: the champion's own evaluation has some, the rest it was asked afterwards."""
    return _contested(_answers(candidate), _answers(champion) | _answers(candidate, CHAMPIONS))


def paired_before(candidate: Path, champion: Path) -> Tally:
    """Their answers to the champion's held-out items."""
    return _contested(_answers(candidate) | _answers(candidate, EARLIER), _answers(champion))


def _contested(mine: Mapping[str, bool], theirs: Mapping[str, bool]) -> Tally:
    return sum((contest(mine[key], theirs[key]) for key in sorted(mine.keys() & theirs.keys())), Tally())


def _answers(folder: Path, name: str = "predictions.jsonl") -> dict[str, bool]:
    """Right or wrong by prompt, as an evaluation wrote it; empty where it left nothing."""
    file = folder / name
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["prompt"]: row["correct"] for row in rows}


def _report(folder: Path) -> dict[str, Any]:
    file = folder / "report.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return report


def _tokens(report: dict[str, Any]) -> float:
    """What an answer costs, in tokens: both stand on one base, and seconds would measure how busy the machine was."""
    return float((report.get("prompt_tokens", 0) + report.get("completion_tokens", 0)) / max(report.get("n", 0), 1))


def _leaked(student: Student) -> str | None:
    """Held-out prompts that stand in the training rows all the same: then no figure on them can be believed."""
    curated = student.folder / "curated"
    trained, held = (_prompts(curated / f"{name}.jsonl") for name in ("train", "test"))
    leaked = len(trained & held)
    return f"{leaked} of {len(held)} held-out prompts were trained on" if leaked else None


def _too_good(report: dict[str, Any]) -> str | None:
    """Held-out items far better known than canaries, which were never in any file a training could read."""
    canaries = report["canaries"]
    held_out = Tally(report["correct"], 0, report["n"] - report["correct"])
    doubt = inflated(held_out, Tally(canaries["correct"], 0, canaries["n"] - canaries["correct"]))
    return doubt.reason if doubt.alarm else None


def _prompts(file: Path) -> set[str]:
    """The prompts of a split as canonical text; empty where there is none."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {json.dumps(row["messages"][:-1], sort_keys=True) if "messages" in row else str(row.get("prompt")) for row in rows}


def _job(cycle: Cycle, judged: Judged) -> dict[str, Any]:
    student, verdict = judged.student, judged.verdict
    return {
        "student_dir": str(student.folder),
        "name": student.name,
        "version": student.version,
        "verdict": {"decision": DECISIONS[verdict.action], "reason": verdict.reason, "evidence": judged.evidence.to_dict()},
        "tags": {
            "tenant": cycle.tenant_id,
            "domain": student.domain,
            "cycle": cycle.id,
            "tier": verdict.tier or "none",
            "gate": verdict.action,
        },
        "description_markdown": card(student, judged.evidence, verdict),
    }
