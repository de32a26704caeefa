"""The gate on a real PostgreSQL and a student's own files: a first student, one that challenges it, one that is no better."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flows import gate as gates
from flows.students import Student
from flows.workshop import Cycle
from tutelage.evolution.evidence import Tally
from tutelage.records import Tenant
from tutelage.routing.confidence import Calibrator
from tutelage.scoring import wilson
from tutelage.settings import CHECKOUT
from tutelage.stores import evidence, registry, tenants
from tutelage.stores.database import Pool, open_pool

TENANT = Tenant("ten_a", "acme", "pro")
ITEMS = 110


@pytest.fixture
async def pool(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    async def shown_nowhere(**_: Any) -> None:
        """Prefect's artifacts want its server, which a gate does not."""

    monkeypatch.setattr(gates, "acreate_markdown_artifact", shown_nowhere)
    pool = await open_pool(database_url, size=2)
    await tenants.create_tenant(pool, TENANT)
    await registry.open_cycle(pool, "c1", TENANT.id)
    yield pool
    await pool.close()


@pytest.fixture
def cycle(database_url: str, tmp_path: Path) -> Cycle:
    (tmp_path / "config").mkdir()
    for source in (CHECKOUT / "configs").glob("*.yaml"):
        (tmp_path / "config" / source.name).write_text(source.read_text())
    (tmp_path / "config" / "tier.yaml").write_text("port: 9")  # no tier listens there
    return Cycle("c1", TENANT.id, TENANT.name, tmp_path, tmp_path / "config", database_url)


async def trained(pool: Pool, cycle: Cycle, right: range, *, canaries: tuple[int, int] = (0, 0)) -> Student:
    """A version that got the items of `right` and the first of so many canaries right, with the files that its stages leave."""
    folder = str(cycle.state.students / "acme-sums" / "v{version}")
    number = await registry.spawn(pool, tenant_id=TENANT.id, domain="sums", student="acme-sums", cycle_id="c1", folder=folder)
    student = Student("acme-sums", number, "sums", Path(folder.format(version=number)), 700)
    (student.folder / "adapter").mkdir(parents=True)
    share = wilson(len(right), ITEMS)
    report = {
        "n": ITEMS, "correct": share.k, "wins": share.k, "accuracy": share.rate, "wilson95": [share.lo, share.hi], "majority": 0.2,
        "mean_confidence": 0.9, "ece": 0.05, "untrained": {"n": 30, "correct": 1}, "prompt_tokens": 4000, "completion_tokens": 400,
        "calibrator": Calibrator("platt", 200, a=1.0).to_dict(),
        "canaries": {"n": canaries[1], "correct": canaries[0], "right": {f"{n:02x}": n < canaries[0] for n in range(canaries[1])}},
    }  # fmt: skip
    manifest = {
        "adapter_digest": f"d{number}", "base_fingerprint": "base", "learnable": True, "reason": "validation rose", "threads": 1,
        "metrics": {"examples": 500, "steps": 90, "seconds": 60},
    }  # fmt: skip
    predictions = [{"prompt": f"item {item}", "correct": item in right} for item in range(ITEMS)]
    (student.folder / "report.json").write_text(json.dumps(report))
    (student.folder / "adapter" / "manifest.json").write_text(json.dumps(manifest))
    (student.folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    return student


async def judged(pool: Pool, cycle: Cycle, right: range, **more: Any) -> gates.Judged:
    entry = await gates.gate.fn(cycle, await trained(pool, cycle, right, **more))
    await gates.roll_out.fn(cycle, entry)
    return entry


async def test_a_first_student_that_convinces_answers_its_domain_at_once(pool: Pool, cycle: Cycle) -> None:
    entry = await judged(pool, cycle, range(100))

    assert (entry.verdict.action, entry.verdict.tier) == ("promote", "ta")
    assert (await registry.pointer(pool, TENANT.id, "sums")).version == 1
    assert await evidence.read(pool, ("acme-sums", 1)) == {"held-out": Tally(100, 0, 10)}
    assert await pool.fetchval("select count(*) from tests where passed") == 1


async def test_a_better_version_challenges_the_champion_from_shadow_with_what_it_showed_already(pool: Pool, cycle: Cycle) -> None:
    await judged(pool, cycle, range(80))
    entry = await judged(pool, cycle, range(2, 100))

    assert entry.verdict.action == "challenge"
    assert (await registry.pointer(pool, TENANT.id, "sums")).version == 1
    (rollout,) = await evidence.rollouts(pool)
    assert (rollout.version, rollout.percent) == (2, 0)
    assert (await evidence.read(pool, ("acme-sums", 2)))["pairs"] == Tally(20, 88, 2)
    assert [name for name, _, _ in await registry.standby(pool)] == ["acme-sums.v2"]


async def test_a_version_that_is_no_better_is_refused_and_nothing_changes(pool: Pool, cycle: Cycle) -> None:
    await judged(pool, cycle, range(90))
    entry = await judged(pool, cycle, range(10, 98))

    assert entry.verdict.action == "refuse"
    assert "not better than the champion" in entry.verdict.reason
    assert await evidence.rollouts(pool) == []


async def test_a_student_that_knows_the_judged_items_and_no_canary_is_refused(pool: Pool, cycle: Cycle) -> None:
    entry = await judged(pool, cycle, range(ITEMS), canaries=(8, 18))

    assert entry.verdict.action == "refuse"
    assert "not believed" in entry.verdict.reason
    assert await registry.champions(pool) == []


async def test_a_tier_that_people_confirm_is_given_once_they_have_and_until_then_the_next_lower_one(pool: Pool, cycle: Cycle) -> None:
    (cycle.config_dir / "promotion.yaml").write_text("approval: [ta]")
    entry = await judged(pool, cycle, range(100))

    assert (entry.verdict.action, entry.verdict.tier, entry.verdict.awaits) == ("keep", "student", "ta")
    assert (await registry.pointer(pool, TENANT.id, "sums")).tier == "student"
    (version,) = await registry.list_versions(pool)
    assert (version["status"], version["awaits"]) == ("student", "ta")


async def test_where_people_confirm_every_tier_nothing_answers_before_they_have(pool: Pool, cycle: Cycle) -> None:
    (cycle.config_dir / "promotion.yaml").write_text("approval: [student, ta]")
    entry = await judged(pool, cycle, range(100))

    assert (entry.verdict.action, entry.verdict.awaits) == ("wait", "ta")
    assert await registry.champions(pool) == []
    (version,) = await registry.list_versions(pool)
    assert (version["status"], version["awaits"]) == ("waiting", "ta")
    assert "waits for a person | as **ta**" in gates.card(entry.student, entry.evidence, entry.verdict)


async def test_a_better_version_that_forgot_earlier_traffic_is_refused(pool: Pool, cycle: Cycle) -> None:
    await judged(pool, cycle, range(80), canaries=(40, 50))
    entry = await judged(pool, cycle, range(2, 100), canaries=(37, 50))

    assert entry.verdict.action == "refuse"
    assert "6.0% of 50 canaries lost" in entry.verdict.reason
    assert (await registry.pointer(pool, TENANT.id, "sums")).version == 1
