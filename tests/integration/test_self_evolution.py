"""SelfEvolutionEngine on a real PostgreSQL: cycles from inside a program, proposals, and what presets mean."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tutelage import DistributedOrchestrator, SelfEvolutionEngine
from tutelage.errors import ConfigInvalid, InvalidRequest, NotFound
from tutelage.fleet import engines
from tutelage.records import Interaction, Tenant
from tutelage.settings import CHECKOUT, Home
from tutelage.stores import interactions, tenants
from tutelage.stores.database import open_pool

TENANT = Tenant("ten_a", "acme", "pro")


@pytest.fixture
def orchestrator(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DistributedOrchestrator]:
    home.models.joinpath("encoder").symlink_to(encoder)
    told = {"TUTELAGE_HOME": str(home.root), "TUTELAGE_DATABASE_URL": database_url, "TUTELAGE_VALKEY_URL": servers.valkey_url}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with DistributedOrchestrator() as made:
        asyncio.run(_record(database_url, 120))
        yield made


async def _record(url: str, count: int) -> None:
    pool = await open_pool(url, size=2)
    await tenants.create_tenant(pool, TENANT)
    recorder = interactions.Recorder(pool, flush_seconds=0, batch_rows=50, deadline_seconds=10)
    recorder.start()
    for number in range(count):
        await recorder.record(
            Interaction(
                request_id=f"r{number}", tenant_id=TENANT.id, key_id="k", created_at=datetime.now(UTC), prompt_hash=b"h", answer="4",
                messages=[{"role": "user", "content": f"question {number}"}], model="teacher", tier="teacher", route="cascade", reason="",
                cache="miss", domain="sums", given_domain="sums", confidence=None, finish_reason="stop", prompt_tokens=7,
                completion_tokens=1, tokens_estimated=False, cost_microusd=30, latency_ms=12,
            )
        )  # fmt: skip
    await recorder.stop()
    await pool.close()


@pytest.mark.slow
def test_a_cycle_that_proposes_tells_its_gaps_and_trains_nobody(orchestrator: DistributedOrchestrator) -> None:
    engine = SelfEvolutionEngine(orchestrator, preset="stable", evolution_interval=100)
    assert engine.due()[TENANT.id].due
    (cycle,) = engine.trigger_evolution_cycle(TENANT.id)

    assert (cycle.status, cycle.students) == ("finished", ())
    assert [(gap["domain"], gap["decision"]) for gap in cycle.to_dict()["gaps"]] == [("sums", "propose")]
    assert [(gap["domain"], gap["decision"]) for gap in engine.gaps()] == [("sums", "propose")]
    assert not engine.due()[TENANT.id].due


def test_only_a_gap_that_is_worth_it_can_be_spawned_by_hand(orchestrator: DistributedOrchestrator) -> None:
    engine = SelfEvolutionEngine(orchestrator, preset="stable")
    with pytest.raises(InvalidRequest, match="no domain 'dates'; it has: sums"):
        engine.spawn(TENANT.id, "dates")
    with pytest.raises(NotFound):
        engine.trigger_evolution_cycle("nobody")


def test_what_is_given_stands_above_the_preset_and_what_is_wrong_is_told(orchestrator: DistributedOrchestrator) -> None:
    settings = SelfEvolutionEngine(orchestrator, 70, preset="aggressive").settings

    assert (settings.evolution_interval, settings.auto_spawn_students, settings.max_models_per_domain) == (70, True, 10)
    with pytest.raises(ConfigInvalid, match="evolution_interval"):
        SelfEvolutionEngine(orchestrator, evolution_interval=0)


@pytest.mark.slow
def test_the_program_of_the_docs_runs(orchestrator: DistributedOrchestrator) -> None:
    program = (CHECKOUT / "docs/python.md").read_text().split("## Evolution cycles")[1].split("```python")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, env=os.environ, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "0 interactions since the last cycle" in done.stdout
    assert "finished" in done.stdout
