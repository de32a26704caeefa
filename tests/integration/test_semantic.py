"""Answers to paraphrases over HTTP, on a real PostgreSQL and Valkey: given once a tenant's error budget is earned, never beyond it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import valkey
from fakes import FakeModelServer
from test_gateway import configure, entry, serving, until

from tutelage.fleet import engines
from tutelage.operations import add_tenant
from tutelage.routing.pairs import TRAITS
from tutelage.settings import Home
from tutelage.stores import bodies, labels, tenants
from tutelage.stores.labels import PairLabel

PAIR = ("How do I reset the router?", "What is the way to reset a router?")
PARAPHRASES = [
    ("How can I lose weight quickly?", "What is the quickest way of losing weight?"),
    ("Explain how photosynthesis works", "How does photosynthesis work?"),
    ("How do I boil an egg?", "What is the best way to boil eggs?"),
    ("Who invented the telephone?", "Who was the inventor of the telephone?"),
    ("How do vaccines work?", "What is the way in which vaccines work?"),
]
LOOK_ALIKES = [
    ("How do I turn on dark mode?", "How do I turn off dark mode?"),
    ("What is the capital of France?", "What is the capital of Spain?"),
    ("Convert 5 km to miles", "Convert 5 miles to km"),
    ("Is Rust faster than Go?", "Is Go faster than Rust?"),
    ("How far is the Moon in km?", "How far is the Moon in miles?"),
    ("What are 12 uses of salt?", "What are 13 uses of salt?"),
    ("Why does bread rise?", "Why does bread not rise?"),
]


@dataclass
class Running:
    http: httpx.AsyncClient
    tenant_id: str
    teacher: FakeModelServer
    app: Any
    key: str

    async def ask(self, text: str, *, before: list[dict[str, Any]] | None = None, **more: Any) -> httpx.Response:
        messages = [*(before or []), {"role": "user", "content": text}]
        headers = more.pop("headers", {})
        return await self.http.post("/v1/chat/completions", json={"model": "auto", "messages": messages, **more}, headers=headers)

    async def told(self, text: str, **more: Any) -> str:
        return (await self.ask(text, **more)).headers["x-tutelage-cache"]

    def counted(self, what: str) -> int:
        return self.app.state.semantic.statistics.get(self.tenant_id, {}).get(what, 0)

    async def remembered(self, questions: int) -> None:
        await until(lambda: len(self.app.state.semantic._tenant(self.tenant_id).neighbours) >= questions, seconds=20)

    async def earn(self, *, right: bool = True, tenant_id: str | None = None) -> None:
        """As if so many shadows had said so."""
        semantic, of = self.app.state.semantic, tenant_id or self.tenant_id
        known = len(semantic._tenant(of).labels)
        await labels.add(self.app.state.pool, [PairLabel(of, 0.99, right, (0.0,) * len(TRAITS))] * 250)
        await until(lambda: len(semantic._tenant(of).labels) >= known + 250, seconds=20)


@pytest.fixture
def teacher() -> Iterator[FakeModelServer]:
    with FakeModelServer("Hold the button for ten seconds.") as server:
        yield server


@asynccontextmanager
async def gateway(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str, teacher: FakeModelServer, **settings: Any
) -> AsyncIterator[Running]:
    if not home.models.joinpath("encoder").exists():
        home.models.joinpath("encoder").symlink_to(encoder)
    config = configure(home.folder("config"), [entry(teacher)], **{"semantic_seconds": 0.05, "semantic_shadow": 0.005, **settings})
    async with serving(home, config, servers, database_url, teacher.url) as app:
        app.state.semantic._chance = lambda: 1.0  # no shadows beside those that a test wants
        made = await add_tenant(
            app.state.pool, home.secret("pepper"), name=f"acme-{len(app.state.watcher.current.tenants)}", tier="enterprise"
        )
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            http.headers["authorization"] = f"Bearer {made['key']}"
            await until(lambda: made["key_id"] in app.state.watcher.current.keys)
            yield Running(http, made["tenant_id"], teacher, app, made["key"])


@pytest.fixture
async def running(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str, teacher: FakeModelServer
) -> AsyncIterator[Running]:
    async with gateway(home, encoder, servers, database_url, teacher) as started:
        yield started


async def test_a_paraphrase_is_a_miss_until_the_budget_is_earned_and_then_a_hit_that_costs_nothing(running: Running) -> None:
    assert await running.told(PAIR[0]) == "miss"
    await running.remembered(1)
    assert await running.told("How can I reset the router?") == "miss", "nothing is known of this tenant yet"
    await running.earn()
    calls = len(running.teacher.requests)
    hit = await running.ask(PAIR[1])

    assert hit.headers["x-tutelage-cache"] == "hit-semantic"
    assert hit.json()["choices"][0]["message"]["content"] == "Hold the button for ten seconds."
    assert float(hit.headers["x-tutelage-cost-usd"]) == 0
    assert len(running.teacher.requests) == calls
    row = await running.app.state.pool.fetchrow("select * from interactions where request_id = $1", hit.headers["x-request-id"])
    assert (row["cache"], row["cost_microusd"]) == ("hit-semantic", 0)
    assert "the same question with probability" in row["reason"] and "re-verified" in row["reason"]
    assert running.counted("hit") == 1


async def test_shadows_are_compared_and_earn_the_budget_by_themselves(running: Running) -> None:
    await tenants.change_tenant(running.app.state.pool, running.tenant_id, "semantic_error_budget", 0.5)
    await until(lambda: running.app.state.watcher.current.tenants[running.tenant_id].semantic_error_budget == 0.5)
    for number in range(2):  # in two contexts, which share nothing but the tenant's labels
        before = [{"role": "system", "content": f"You are assistant {number}."}]
        for first, _ in PARAPHRASES:
            assert await running.told(first, before=before) == "miss"
        await running.remembered((number + 1) * len(PARAPHRASES) + number * len(PARAPHRASES))
        for _, second in PARAPHRASES:
            assert await running.told(second, before=before) == "miss"
        verified = (number + 1) * len(PARAPHRASES)
        await until(lambda n=verified: running.counted("verified-right") == n)  # type: ignore[misc]
    await until(lambda: len(running.app.state.semantic._tenant(running.tenant_id).labels) == 2 * len(PARAPHRASES))
    await running.ask(PAIR[0])
    await running.remembered(4 * len(PARAPHRASES) + 1)

    assert await running.told(PAIR[1]) == "hit-semantic"


async def test_wrong_shadows_never_earn_it_and_take_it_away(running: Running) -> None:
    await running.earn()
    await running.ask(PAIR[0])
    await running.remembered(1)
    assert await running.told(PAIR[1]) == "hit-semantic"
    running.app.state.semantic._chance = lambda: 0.0  # every one is asked all the same
    running.teacher.answer = "Turn it off and on."
    assert await running.told(PAIR[1]) == "miss"
    await until(lambda: running.counted("verified-wrong") == 1)
    running.app.state.semantic._chance = lambda: 1.0
    await running.earn(right=False)
    assert await running.told("What is a way to reset the router?") == "miss"


async def test_look_alikes_are_never_served(running: Running) -> None:
    await running.earn()
    for first, _ in LOOK_ALIKES:
        await running.ask(first)
    await running.remembered(len(LOOK_ALIKES))
    for _, second in LOOK_ALIKES:
        assert await running.told(second) == "miss", second
    assert (
        sum(count for what, count in running.app.state.semantic.statistics[running.tenant_id].items() if what.startswith("rejected-")) > 0
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"before": [{"role": "system", "content": "Answer in French."}]},
        {"before": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
        {"tools": [{"type": "function", "function": {"name": "reset", "parameters": {}}}]},
        {"max_tokens": 7},
        {"model": "big"},
        {"temperature": 0.7},
        {"headers": {"x-tutelage-cache": "private"}},
    ],
    ids=["system", "conversation", "tools", "parameter", "model", "sampled", "private"],
)
async def test_nothing_crosses_into_another_context(running: Running, changed: dict[str, Any]) -> None:
    await running.earn()
    await running.ask(PAIR[0])
    await running.remembered(1)
    assert await running.told(PAIR[1], **changed) in ("miss", "bypass")


async def test_two_tenants_never_share(running: Running, home: Home) -> None:
    await running.ask(PAIR[0])
    await running.remembered(1)
    other = await add_tenant(running.app.state.pool, home.secret("pepper"), name="other", tier="enterprise")
    await until(lambda: other["key_id"] in running.app.state.watcher.current.keys)
    await running.earn(tenant_id=other["tenant_id"])

    assert await running.told(PAIR[1], headers={"authorization": f"Bearer {other['key']}"}) == "miss"
    assert await running.told("How can I reset the router?") == "miss", "what the other earned is its own"


async def test_an_answer_of_a_model_that_changed_is_never_given_to_a_paraphrase(running: Running, home: Home) -> None:
    await running.earn()
    await running.ask(PAIR[0])
    await running.remembered(1)
    assert await running.told(PAIR[1]) == "hit-semantic"
    configure(home.folder("config"), [entry(running.teacher, model="big-2")], semantic_seconds=0.05)
    running.app.state.configuration.look()

    assert await running.told(PAIR[1]) == "miss"
    assert running.counted("stale") == 1


async def test_a_stream_gets_a_paraphrases_answer_as_a_stream(running: Running) -> None:
    await running.earn()
    client = openai.AsyncOpenAI(api_key=running.key, base_url="http://gateway/v1", http_client=running.http, max_retries=0)
    first = await client.chat.completions.create(model="auto", messages=[{"role": "user", "content": PAIR[0]}], stream=True)
    said = "".join([chunk.choices[0].delta.content or "" async for chunk in first if chunk.choices])
    await running.remembered(1)
    again = await client.chat.completions.with_raw_response.create(
        model="auto", messages=[{"role": "user", "content": PAIR[1]}], stream=True
    )
    chunks = [chunk async for chunk in again.parse()]

    assert again.headers["x-tutelage-cache"] == "hit-semantic"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_switched_off_nothing_is_remembered(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str, teacher: FakeModelServer
) -> None:
    async with gateway(home, encoder, servers, database_url, teacher, semantic_cache=False) as running:
        await running.earn()
        assert [await running.told(text) for text in (PAIR[0], PAIR[0], PAIR[1])] == ["miss", "hit-exact", "miss"]
        await asyncio.sleep(0.2)
        assert len(running.app.state.semantic._tenant(running.tenant_id).neighbours) == 0


async def test_a_tenant_that_wants_none_gets_none(running: Running) -> None:
    await tenants.change_tenant(running.app.state.pool, running.tenant_id, "semantic_error_budget", 0.0)
    await until(lambda: running.app.state.watcher.current.tenants[running.tenant_id].semantic_error_budget == 0.0)
    await running.earn()
    assert [await running.told(text) for text in PAIR] == ["miss", "miss"]


async def test_another_worker_finds_what_the_first_one_kept(
    running: Running, home: Home, encoder: Path, servers: engines.Engines, database_url: str, teacher: FakeModelServer
) -> None:
    await running.earn()
    await running.ask(PAIR[0])
    async with gateway(home, encoder, servers, database_url, teacher) as second:
        second.http.headers["authorization"], second.tenant_id = f"Bearer {running.key}", running.tenant_id
        await second.remembered(1)
        assert await second.told(PAIR[1]) == "hit-semantic"


async def test_an_erasure_leaves_no_question_in_the_worker_or_in_valkey(running: Running, servers: engines.Engines) -> None:
    await running.earn()
    await running.ask(PAIR[0])
    await running.remembered(1)
    store, pattern = valkey.from_url(servers.valkey_url), f"tutelage:exact:{running.tenant_id}:*"
    await until(lambda: any(b"router" in (store.get(key) or b"") for key in store.scan_iter(pattern)))
    await bodies.erase(running.app.state.pool, running.tenant_id, actor="test")
    await until(lambda: len(running.app.state.semantic._tenant(running.tenant_id).neighbours) == 0)
    await until(lambda: not any(store.scan_iter(pattern)))

    assert await running.told(PAIR[1]) == "miss"
