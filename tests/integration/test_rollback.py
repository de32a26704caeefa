"""A rollback while requests are running: within two seconds the version before answers, no request fails, no cached answer of the one that
left is given again."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeModelServer, FakeTier
from test_gateway import Running, configure, entry, promote, serving, until

from flows.watch import Rules, look
from tutelage.evolution.promotion import PromotionSettings
from tutelage.evolution.rollout import RolloutSettings
from tutelage.evolution.watch import WatchSettings
from tutelage.fleet import engines
from tutelage.operations import add_tenant
from tutelage.routing.confidence import Calibrator
from tutelage.settings import Home
from tutelage.stores import registry
from tutelage.stores.registry import Decision, Pointer

pytestmark = pytest.mark.slow
RULES = Rules(PromotionSettings(), RolloutSettings(), WatchSettings(baseline_outcomes=50))
CLIENTS = 12
OLD, NEW, SPOILT = "four", "4", "5"  # what version 1, version 2, and version 2 once it has got worse say


@pytest.fixture
def tier() -> Iterator[FakeTier]:
    with FakeTier(**{"acme-sums.v1": (OLD, "digest-1"), "acme-sums.v2": (NEW, "digest-2")}) as server:
        yield server


@pytest.fixture
async def running(home: Home, encoder: Path, servers: engines.Engines, database_url: str, tier: FakeTier) -> AsyncIterator[Running]:
    """Version 2 answers sums, version 1 did before; snapshots are as old as in service."""
    home.models.joinpath("encoder").symlink_to(encoder)
    with FakeModelServer("from the teacher") as teacher:
        config = configure(home.folder("config"), [entry(teacher)], snapshot_seconds=0.5)
        async with serving(home, config, servers, database_url, tier.url) as app:
            made = await add_tenant(app.state.pool, home.secret("pepper"), name="acme", tier="enterprise")
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=30) as http:
                http.headers.update({"authorization": f"Bearer {made['key']}", "x-tutelage-domain": "sums"})
                await until(lambda: made["key_id"] in app.state.watcher.current.keys)
                yield Running(http, None, made["key"], made["tenant_id"], app.state.pool, teacher, tier, app)  # type: ignore[arg-type]


@dataclass
class Load:
    """Clients that ask without a pause, every third time what was asked before, and say whether the answer was right."""

    running: Running
    replies: list[tuple[float, int, str, str, str]] = field(default_factory=list)  # when, status, text, cache state, prompt
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2))

    async def client(self, until: asyncio.Event) -> None:
        while not until.is_set():
            number = next(self.numbers)
            await self.ask(f"What is {number - 20 if number % 3 == 0 else number} + 2?")

    async def ask(self, prompt: str) -> str:
        reply = await self.running.http.post(
            "/v1/chat/completions", json={"model": "auto", "messages": [{"role": "user", "content": prompt}]}
        )
        text = reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else reply.text
        self.replies.append((time.time(), reply.status_code, text, reply.headers.get("x-tutelage-cache", ""), prompt))
        if reply.status_code == 200 and reply.headers["x-tutelage-cache"] == "miss":
            verdict = {"request_id": reply.headers["x-request-id"], "score": float(text != SPOILT)}
            await self.running.http.post("/v1/feedback", json=verdict)
        return str(text)


async def replace_champion(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    tenant_id, pool = running.tenant_id, running.pool
    await registry.spawn(pool, tenant_id=tenant_id, domain="sums", student="acme-sums", cycle_id="c1", folder="/s/v{version}")
    facts: dict[str, Any] = {"digest": "digest-2", "calibrator": Calibrator("platt", 200, a=1.0, b=0.0).to_dict(), "evidence": {}}
    await registry.complete_version(pool, "acme-sums", 2, status="ta", **facts)
    champion = Pointer(2, "acme-sums", 2, "ta")
    await registry.decide(pool, Decision(tenant_id, "sums", "promote", "acme-sums", 2, champion, "better", {}), expected=1)
    await until(lambda: [s.version for s in running.app.state.watcher.current.view(tenant_id).students] == [2])


async def rolled_back(running: Running) -> float:
    """Look as the watch does until it rolls back; when it did, as the ledger says."""
    for _ in range(300):
        if any("rolled back" in line for line in await look(running.pool, RULES)):
            line = (await registry.list_promotions(running.pool))[-1]
            return float(line["created_at"].timestamp())
        await asyncio.sleep(0.1)
    raise AssertionError("the watch saw nothing wrong")


async def test_a_rollback_under_load_restores_within_two_seconds_and_fails_no_request(
    running: Running, tier: FakeTier, encoder: Path
) -> None:
    await replace_champion(running, encoder)
    load, done = Load(running), asyncio.Event()
    clients = [asyncio.create_task(load.client(done)) for _ in range(CLIENTS)]
    while sum(text == NEW for _, _, text, _, _ in load.replies) < 200:
        await asyncio.sleep(0.05)
        await look(running.pool, RULES)
    await asyncio.sleep(2.5)  # what is younger than two seconds is not looked at yet
    assert await look(running.pool, RULES) == []
    tier.held["acme-sums.v2"] = (SPOILT, "digest-2")
    at = await rolled_back(running)
    await asyncio.sleep(3)
    done.set()
    await asyncio.gather(*clients)

    assert {status for _, status, _, _, _ in load.replies} == {200}
    last = max(when for when, _, text, _, _ in load.replies if text in (NEW, SPOILT))
    assert last - at < 2, f"version 2 was still given {last - at:.2f} s after the rollback"
    after = [text for when, _, text, _, _ in load.replies if when > at + 2]
    assert len(after) > CLIENTS and set(after) == {OLD}, "the version before answers, and nobody else had to"


async def test_what_was_kept_of_the_version_that_left_is_not_given_again(running: Running, encoder: Path) -> None:
    await replace_champion(running, encoder)
    load = Load(running)
    assert [await load.ask("What is 2 + 2?") for _ in range(2)] == [NEW, NEW]
    assert [cache for _, _, _, cache, _ in load.replies] == ["miss", "hit-exact"]
    former = await registry.before(running.pool, running.tenant_id, "sums", student="acme-sums", version=2)
    decision = Decision(running.tenant_id, "sums", "rollback", "acme-sums", 2, former, "worse", {})
    await registry.decide(running.pool, decision, expected=former.sequence)
    await until(lambda: [s.version for s in running.app.state.watcher.current.view(running.tenant_id).students] == [1])

    assert [await load.ask("What is 2 + 2?") for _ in range(2)] == [OLD, OLD]
    assert [cache for _, _, _, cache, _ in load.replies[2:]] == ["miss", "hit-exact"]
