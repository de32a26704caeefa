"""The end of a cycle: judge, register, package, roll out. The rule is `tutelage.evolution.promotion`; here it takes effect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.students import Student
from flows.workshop import Cycle, connected, run_stage, tell
from tutelage.evolution.promotion import Evidence, PromotionSettings, Verdict, judge
from tutelage.fleet.tiers import TierControl, Wanted
from tutelage.settings import TierSettings, load
from tutelage.stores import registry
from tutelage.stores.registry import Decision, Pointer

DECISIONS = {"promote": "promoted", "keep": "kept", "refuse": "refused"}
ALIASES = {"promote": "champion", "keep": "student", "refuse": None}


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
        champion = await _accuracy(pool, pointer)
        evidence = _evidence(report, manifest, champion)
        verdict = judge(evidence, load(PromotionSettings, cycle.config_dir))
        await registry.complete_version(
            pool,
            student.name,
            student.version,
            status={"promote": "ta", "keep": "student", "refuse": "refused"}[verdict.action],
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
    """Every candidate becomes an MLflow model version with its evidence; the refused ones too, with their reason."""
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
    """A promoted student becomes a Bento that serves on its own: `bentoml serve NAME:VERSION`."""
    student, manifest = judged.student, judged.student.manifest()
    arguments = ["-m", "bentos.tier.package", "--student-name", student.name, "--adapter", str(student.folder / "adapter")]
    arguments += ["--digest", manifest["adapter_digest"], "--base", str(cycle.state.models / "smollm2-135m-instruct")]
    told = await run_stage(cycle, "package", [*arguments, "--label", f"cycle={cycle.id}"], student=student.name)
    tag = json.loads(told.splitlines()[-1])["tag"]
    async with connected(cycle) as pool:
        await registry.complete_version(pool, student.name, student.version, bento=tag)
    tell("package", f"bento {tag}", student=student.name)


@task(cache_policy=NO_CACHE, task_run_name="rollout-{judged.student.name}")
async def roll_out(cycle: Cycle, judged: Judged) -> None:
    """Load the adapter where the tier runs, then move the champion pointer by compare-and-set; a refusal is noted and moves nothing."""
    student, verdict = judged.student, judged.verdict
    if verdict.action != "refuse":
        _load(cycle, judged)
    now = Pointer(judged.pointer.sequence + 1, student.name, student.version, verdict.tier)
    champion = judged.pointer if verdict.action == "refuse" else now
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
        )
    tell("rollout", "refused, nothing changes" if verdict.action == "refuse" else f"answers {student.domain}", student=student.name)


def card(student: Student, evidence: Evidence, verdict: Verdict) -> str:
    """What a reviewer needs to decide from, in Markdown."""
    before = "not measured" if evidence.before is None else f"{evidence.before:.3f}"
    rows = {
        "verdict": f"**{verdict.action}**",
        "reason": verdict.reason,
        "held-out items": evidence.n,
        "right": f"{evidence.accuracy:.3f}, 95 % Wilson [{evidence.lower:.3f}, {evidence.upper:.3f}]",
        "untrained base": before,
        "always the majority answer": f"{evidence.majority:.3f}",
        "at least as good as the teacher": f"{evidence.wins} of {evidence.n}",
        "mean calibrated confidence": f"{evidence.confidence:.3f}",
        "calibration error (ECE)": "not measured" if evidence.ece is None else f"{evidence.ece:.3f}",
        "learnable": f"{evidence.learnable}: {evidence.learnable_reason}",
    }
    head = f"## {student.name} v{student.version}\n\nDomain **{student.domain}**, from {student.requests} requests.\n\n| | |\n|---|---|\n"
    return head + "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items())


def _evidence(report: dict[str, Any], manifest: dict[str, Any], champion: float | None) -> Evidence:
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
        champion_accuracy=champion,
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


async def _accuracy(pool: Any, pointer: Pointer) -> float | None:
    """The champion's share right on the held-out items: they are frozen, so it compares with the candidate's."""
    for version in await registry.list_versions(pool):
        if (version["student"], version["version"]) == (pointer.student, pointer.version):
            return float(version["evidence"]["accuracy"])
    return None


def _job(cycle: Cycle, judged: Judged) -> dict[str, Any]:
    student, verdict = judged.student, judged.verdict
    alias = ALIASES[verdict.action]
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
        "aliases": [alias] if alias else [],
    }


def _load(cycle: Cycle, judged: Judged) -> None:
    """Raises AdapterRejected when the tier refuses the files. No running tier is no fault: `serve` loads what the ledger names."""
    port = load(TierSettings, cycle.config_dir).port
    control = TierControl(f"http://127.0.0.1:{port}", cycle.state.secret("tier_token"))
    try:
        if not control.ready():
            tell("rollout", "no tier runs; it will load the adapter when it starts", student=judged.student.name)
            return
        student, digest = judged.student, judged.student.manifest()["adapter_digest"]
        name = registry.adapter_name(student.name, student.version)
        control.load(Wanted(name, str(student.folder / "adapter"), digest))
    finally:
        control.close()
