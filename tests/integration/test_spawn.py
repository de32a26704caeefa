"""From the decision to a student: registered, loadable, taught, in shadow; and how many versions a domain keeps. On a real PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import yaml
from fakes import build_tiny_base

from flows import students
from flows.workshop import Cycle
from inference import adapters, base
from tutelage.errors import PlanLimitReached
from tutelage.records import Tenant
from tutelage.settings import Home
from tutelage.stores import cycles, evidence, registry, tenants
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.registry import Decision, Pointer

TENANT = Tenant("ten_a", "acme", "pro")


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database_url, size=2)
    await tenants.create_tenant(pool, TENANT)
    await registry.open_cycle(pool, "c1", TENANT.id)
    yield pool
    await pool.close()


@pytest.fixture
def cycle(database_url: str, home: Home) -> Cycle:
    build_tiny_base(home.models / "smollm2-135m-instruct")
    config = home.folder("config")
    teachers = [
        {"name": "big", "kind": "openai", "base_url": "http://m"},
        {"name": "mathematician", "kind": "openai", "base_url": "http://m", "domains": ["sums"]},
    ]
    (config / "models.yaml").write_text(yaml.safe_dump({"models": teachers}))
    (config / "tier.yaml").write_text("port: 9")  # no tier listens there
    return Cycle("c1", TENANT.id, TENANT.name, home.root, config, database_url)


async def test_a_decision_becomes_a_registered_loadable_student_in_shadow_with_its_teachers(pool: Pool, cycle: Cycle) -> None:
    student = await students.begin(cycle, "sums")

    (version,) = await registry.list_versions(pool)
    assert (version["student"], version["version"], version["status"]) == ("acme-sums", 1, "training")
    assert version["teachers"] == ["mathematician"]
    fingerprint = base.fingerprint(cycle.state.models / "smollm2-135m-instruct")
    adapters.verify(student.folder / "fresh", digest=version["fresh_digest"], base_fingerprint=fingerprint)
    (shadow,) = await registry.spawned(pool)
    assert (shadow.domain, shadow.adapter, shadow.digest) == ("sums", "acme-sums.v1", version["fresh_digest"])
    assert await registry.champions(pool) == []


async def test_the_shadow_ends_with_its_cycle(pool: Pool, cycle: Cycle) -> None:
    await students.begin(cycle, "sums")
    await registry.close_cycle(pool, "c1", status="failed", summary={})
    await cycles.clear_halves(pool, TENANT.id)

    assert await registry.spawned(pool) == []
    assert [v["status"] for v in await registry.list_versions(pool)] == ["abandoned"]


async def serve(pool: Pool, version: int) -> None:
    now = await registry.pointer(pool, TENANT.id, "sums")
    await registry.complete_version(pool, "acme-sums", version, status="ta", digest=f"d{version}", calibrator={})
    decision = Decision(
        TENANT.id, "sums", "promote", "acme-sums", version, Pointer(now.sequence + 1, "acme-sums", version, "ta"), "better", {}
    )
    await registry.decide(pool, decision, expected=now.sequence)


async def spawn(pool: Pool, most: int) -> int:
    return await registry.spawn(pool, tenant_id=TENANT.id, domain="sums", student="acme-sums", cycle_id="c1", folder="/s", most=most)


async def test_the_oldest_version_that_nobody_needs_is_retired_for_a_new_one(pool: Pool) -> None:
    for _ in range(4):
        await serve(pool, await spawn(pool, 3))

    assert [v["status"] for v in await registry.list_versions(pool)] == ["retired", "ta", "ta", "ta"]
    assert (await registry.before(pool, TENANT.id, "sums", student="acme-sums", version=4)).version == 3


async def test_a_domain_whose_versions_are_all_needed_gets_no_other(pool: Pool) -> None:
    for _ in range(2):
        await serve(pool, await spawn(pool, 3))
    challenger = await spawn(pool, 3)
    await registry.complete_version(pool, "acme-sums", challenger, status="challenger", digest="d3", calibrator={})
    await evidence.begin_rollout(pool, evidence.Rollout(TENANT.id, "sums", "acme-sums", challenger, 10, "ta"))
    with pytest.raises(PlanLimitReached, match="raise max_models_per_domain"):
        await spawn(pool, 3)

    assert [v["status"] for v in await registry.list_versions(pool)] == ["ta", "ta", "challenger"]


async def test_a_students_plan_bounds_its_tenant_whatever_a_domain_may_keep(pool: Pool, cycle: Cycle) -> None:
    await tenants.change_tenant(pool, TENANT.id, "limits", {"models": 1})
    await students.begin(cycle, "sums")
    with pytest.raises(PlanLimitReached, match="gets no other"):
        await students.begin(cycle, "dates")

    assert [v["student"] for v in await registry.list_versions(pool)] == ["acme-sums"]
