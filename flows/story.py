"""The page of a flow run: what a cycle found, whom it taught, what was decided and what that is expected to save, in one place.

Only what the other stages have measured is shown; it refuses to measure and to decide.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.gate import Judged
from flows.workshop import Cycle
from tutelage.evolution.gaps import Gap
from tutelage.evolution.savings import Saving, expected
from tutelage.settings import TierSettings, load

SERVES = ("promote", "keep")


@task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=2)
async def tell_story(cycle: Cycle, gaps: Sequence[Gap], judged: Sequence[Judged]) -> None:
    """Costs before and after as a table, and the cycle as a page."""
    core_hour = load(TierSettings, cycle.config_dir).core_hour_usd
    savings = {
        entry.student.domain: saving(entry, gap, core_hour) for entry in judged for gap in gaps if gap.domain == entry.student.domain
    }
    table = [
        {
            "domain": domain,
            "before_usd_per_1000": round(one.before / 1000, 4),
            "after_usd_per_1000": round(one.after / 1000, 4),
            "saved_usd_per_day": round(one.per_day / 1e6, 4),
            "verdict": next(entry.verdict.action for entry in judged if entry.student.domain == domain),
        }
        for domain, one in savings.items()
    ]
    if table:
        await acreate_table_artifact(key="costs", table=table, description="Expected cost of a domain's requests, before and after")
    await acreate_markdown_artifact(key="cycle", markdown=story(cycle, gaps, judged, savings))


def saving(judged: Judged, gap: Gap, core_hour_usd: float) -> Saving:
    """From the evaluation's own figures; a student that may not serve saves nothing."""
    report = judged.student.report()
    sure = (report["confident"] or {"share": 0.0})["share"] if judged.verdict.action in SERVES else 0.0
    answer = report["core_seconds"] / max(report["n"], 1) / 3600 * core_hour_usd * 1e6 if judged.verdict.action in SERVES else 0.0
    return expected(
        cost_microusd=gap.cost_microusd, requests=gap.requests, requests_per_day=gap.per_day, share=sure, student_microusd=answer
    )


def story(cycle: Cycle, gaps: Sequence[Gap], judged: Sequence[Judged], savings: dict[str, Saving]) -> str:
    """The cycle in Markdown: each gap in the order of its worth, and below it what became of it."""
    told = {entry.student.domain: entry for entry in judged}
    lines = [f"# Cycle {cycle.id} of {cycle.tenant_name}", ""]
    if not gaps:
        lines.append("No domain has any traffic yet.")
    for gap in gaps:
        lines += [f"## {gap.domain}: {gap.decision}", "", gap.reason + ".", ""]
        entry = told.get(gap.domain)
        if entry is None:
            continue
        evidence, student = entry.evidence, entry.student
        before = "not measured" if evidence.before is None else f"{evidence.before:.2f}"
        lines += [
            f"- **{student.name} v{student.version}** learned from {student.requests} requests.",
            f"- Held-out items right: {before} untrained, **{evidence.accuracy:.2f}** trained "
            f"[{evidence.lower:.2f}, {evidence.upper:.2f}], {evidence.majority:.2f} by always answering the same.",
            f"- Verdict: **{entry.verdict.action}**. {entry.verdict.reason}.",
            f"- Cost, expected: {savings[gap.domain].reason}.",
            "",
        ]
    return "\n".join(lines)
