"""The gateway over HTTP with the official client, on a real PostgreSQL and Valkey; models behind it are fake servers on real ports."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
import yaml
from fakes import FakeModelServer

from tutelage.errors import IdempotencyConflict
from tutelage.fleet import engines
from tutelage.gateway import app as gateway
from tutelage.gateway import keys
from tutelage.operations import add_tenant
from tutelage.records import Key
from tutelage.routing import signs
from tutelage.routing.confidence import Calibrator
from tutelage.routing.domains import discover
from tutelage.routing.encoder import Encoder
from tutelage.routing.promises import Assurance
from tutelage.routing.signs import Reading
from tutelage.settings import Home
from tutelage.stores import interactions, registry, replies, tenants
from tutelage.stores.database import Pool
from tutelage.stores.registry import Decision, Pointer

NOTHING = Assurance()
ASK: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}
SUMS = [f"What is {a} + {b}?" for a in range(2, 12) for b in range(2, 8)]
THINGS = ["rose", "leaf", "sky", "lemon", "coal", "snow", "plum", "cherry", "tomato", "carrot"]
COLOURS = [f"Name the colour of a {thing}." for thing in THINGS for _ in range(6)]


@dataclass
class Running:
    """A gateway in this process, a key of its tenant, and clients that speak to it."""

    http: httpx.AsyncClient
    client: openai.AsyncOpenAI
    key: str
    tenant_id: str
    pool: Pool
    teacher: FakeModelServer
    student: FakeModelServer
    app: Any


@pytest.fixture
def teacher() -> Iterator[FakeModelServer]:
    with FakeModelServer("4") as server:
        yield server


@pytest.fixture
def student() -> Iterator[FakeModelServer]:
    with FakeModelServer("four", logprob=-0.01, fingerprint="digest-1") as server:
        yield server


def configure(folder: Path, teachers: list[dict[str, Any]], **gateway_settings: Any) -> Path:
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": teachers}))
    (folder / "gateway.yaml").write_text(yaml.safe_dump({"snapshot_seconds": 0.05, **gateway_settings}))
    (folder / "routing.yaml").write_text(yaml.safe_dump({"explore": 0.0, "shadow": 0.0}))  # nothing is left to chance
    return folder


def entry(server: FakeModelServer, name: str = "big", **more: Any) -> dict[str, Any]:
    price = {"input_per_mtok": 2.5, "output_per_mtok": 10.0}
    return {"name": name, "kind": "openai", "base_url": f"{server.url}/v1", "price": price, **more}


@asynccontextmanager
async def serving(home: Home, config: Path, servers: engines.Engines, database_url: str, tier_url: str) -> AsyncIterator[Any]:
    app = gateway.build(home, config_dir=config, database_url=database_url, valkey_url=servers.valkey_url, tier_url=tier_url)
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def running(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str, teacher: FakeModelServer, student: FakeModelServer
) -> AsyncIterator[Running]:
    home.models.joinpath("encoder").symlink_to(encoder)
    config = configure(home.folder("config"), [entry(teacher)], max_body_bytes=20_000)
    async with serving(home, config, servers, database_url, student.url) as app:
        pool = app.state.pool
        made = await add_tenant(pool, home.secret("pepper"), name="acme", tier="pro")
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            http.headers["authorization"] = f"Bearer {made['key']}"
            client = openai.AsyncOpenAI(api_key=made["key"], base_url="http://gateway/v1", http_client=http, max_retries=0)
            await until(lambda: made["key_id"] in app.state.watcher.current.keys)
            yield Running(http, client, made["key"], made["tenant_id"], pool, teacher, student, app)


@pytest.fixture
async def served(running: Running) -> AsyncIterator[str]:
    """The same gateway on a real port: only a real connection can be hung up."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(running.app, log_level="critical", lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    await until(lambda: server.started)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    await task


async def until(holds: Callable[[], bool], *, seconds: float = 5) -> None:
    for _ in range(int(seconds / 0.02)):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not become so in time")


async def promote(
    running: Running,
    encoder: Path,
    *,
    tier: str = "ta",
    n: int = 200,
    assurance: Assurance = NOTHING,
    reading: Reading | None = None,
    again: Calibrator | None = None,
) -> None:
    """A student answers sums from now on; its calibrator is sure of log-odds above about 1.7."""
    texts = SUMS + COLOURS
    found = discover(Encoder(encoder).encode(texts), texts, labels=["sums"] * len(SUMS) + ["colours"] * len(COLOURS), seed=0)
    await registry.save_domains(running.pool, running.tenant_id, [d.to_dict() for d in found])
    await registry.open_cycle(running.pool, "c1", running.tenant_id)
    await registry.spawn(
        running.pool, tenant_id=running.tenant_id, domain="sums", student="acme-sums", cycle_id="c1", folder="/s/v{version}"
    )
    calibrator = Calibrator("platt", n, a=1.0, b=0.0, assurance=assurance, reading=reading or Reading(), again=again).to_dict()
    await registry.complete_version(running.pool, "acme-sums", 1, status="ta", digest="digest-1", calibrator=calibrator, evidence={"n": 1})
    champion = Pointer(1, "acme-sums", 1, tier)  # type: ignore[arg-type]
    decision = Decision(running.tenant_id, "sums", "promote", "acme-sums", 1, champion, "clears the floors", {})
    await registry.decide(running.pool, decision, expected=0)
    await until(lambda: bool(running.app.state.watcher.current.view(running.tenant_id).students))


async def until_recorded(running: Running) -> dict[str, Any]:
    """The one interaction, as soon as it is there."""
    for _ in range(250):
        if found := await rows(running):
            return found[0]
        await asyncio.sleep(0.02)
    raise AssertionError("nothing was recorded in time")


async def rows(running: Running) -> list[dict[str, Any]]:
    return [
        dict(r)
        for r in await running.pool.fetch(
            "select interactions.*, messages, answer from interactions left join bodies using (request_id) order by created_at"
        )
    ]


# --- answers ---------------------------------------------------------------------------------------------------------


async def test_the_official_client_gets_the_teachers_answer_and_the_interaction_is_recorded(running: Running) -> None:
    raw = await running.client.chat.completions.with_raw_response.create(**ASK)
    reply = raw.parse()

    assert reply.choices[0].message.content == "4"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (10, 2)
    assert raw.headers["x-tutelage-tier"] == "teacher"
    assert raw.headers["x-tutelage-cache"] == "miss"
    assert float(raw.headers["x-tutelage-cost-usd"]) == pytest.approx(10 * 2.5e-6 + 2 * 10e-6)
    (row,) = await rows(running)
    assert (row["request_id"], row["answer"], row["cost_microusd"]) == (raw.headers["x-request-id"], "4", 45)


async def test_a_stream_says_the_same_in_pieces_and_is_recorded_before_it_ends(running: Running) -> None:
    running.teacher.answer = "forty-two"
    stream = await running.client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]

    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "forty-two"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2
    (row,) = await rows(running)
    assert (row["request_id"], row["answer"]) == (chunks[0].id, "forty-two")


async def test_a_stream_that_breaks_off_ends_in_a_typed_error_and_never_in_done(running: Running) -> None:
    running.teacher.answer, running.teacher.break_after = "forty-two", 3
    response = await running.http.post("/v1/chat/completions", json={**ASK, "stream": True})

    events = [line for line in response.text.splitlines() if line]
    assert "[DONE]" not in response.text
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "upstream_unavailable"
    recorded = await until_recorded(running)  # soon after: what was said is billed as broken off, never as an answer
    assert (recorded["answer"], recorded["finish_reason"]) == ("for", "error")


async def test_the_same_request_again_is_a_hit_that_costs_nothing_and_counts_as_an_interaction(running: Running) -> None:
    first = await running.http.post("/v1/chat/completions", json=ASK)
    again = await running.http.post("/v1/chat/completions", json=ASK)
    streamed = await running.client.chat.completions.create(**ASK, stream=True)

    assert (first.headers["x-tutelage-cache"], again.headers["x-tutelage-cache"]) == ("miss", "hit-exact")
    assert again.json()["choices"] == first.json()["choices"]
    assert float(again.headers["x-tutelage-cost-usd"]) == 0
    assert "".join([c.choices[0].delta.content or "" async for c in streamed if c.choices]) == "4"
    assert len(running.teacher.requests) == 1
    assert [r["cache"] for r in await rows(running)] == ["miss", "hit-exact", "hit-exact"]


async def test_a_header_or_a_temperature_keeps_an_answer_out_of_the_cache(running: Running) -> None:
    for _ in range(2):
        bypassed = await running.http.post("/v1/chat/completions", json=ASK, headers={"x-tutelage-cache": "bypass"})
        sampled = await running.http.post("/v1/chat/completions", json={**ASK, "temperature": 0.7})
        assert {bypassed.headers["x-tutelage-cache"], sampled.headers["x-tutelage-cache"]} == {"bypass"}
    assert len(running.teacher.requests) == 4


async def test_two_tenants_never_share_a_cached_answer(running: Running, home: Home) -> None:
    await running.http.post("/v1/chat/completions", json=ASK)
    other = await add_tenant(running.pool, home.secret("pepper"), name="other", tier="free")
    await until(lambda: other["key_id"] in running.app.state.watcher.current.keys)
    response = await running.http.post("/v1/chat/completions", json=ASK, headers={"authorization": f"Bearer {other['key']}"})

    assert response.headers["x-tutelage-cache"] == "miss"


# --- the cascade -----------------------------------------------------------------------------------------------------


async def test_a_sure_student_answers_alone(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    response = await running.http.post("/v1/chat/completions", json=ASK)

    assert response.json()["choices"][0]["message"]["content"] == "four"
    assert response.headers["x-tutelage-tier"] == "ta"
    assert response.headers["x-tutelage-domain"] == "sums"
    assert float(response.headers["x-tutelage-confidence"]) > 0.85
    assert response.json()["choices"][0]["logprobs"] is None, "the client did not ask for them"
    assert running.teacher.requests == []


@pytest.mark.parametrize(("asked", "shown"), [({}, 0), ({"top_logprobs": 0}, 0), ({"top_logprobs": 1}, 1), ({"top_logprobs": 2.0}, 2)])
async def test_a_client_sees_as_many_alternatives_as_it_asked_for(
    running: Running, encoder: Path, asked: dict[str, Any], shown: int
) -> None:
    await promote(running, encoder)
    response = await running.http.post("/v1/chat/completions", json=ASK | {"logprobs": True} | asked)

    [token] = response.json()["choices"][0]["logprobs"]["content"]
    assert (token["token"], len(token["top_logprobs"])) == ("four", shown)
    assert running.student.requests[0]["top_logprobs"] == 2, "the margin of an answer is read from two"


async def test_an_answer_is_read_as_the_student_was_calibrated(running: Running, encoder: Path) -> None:
    await promote(running, encoder, reading=Reading(margin=1.0, margin_mean=8.0))
    response = await running.http.post("/v1/chat/completions", json=ASK)

    assert response.headers["x-tutelage-tier"] == "teacher", "a lead of three nats is five less than was usual"
    [score] = await running.pool.fetch("select score from attempts")
    assert score["score"] == pytest.approx(signs.score([-0.01]) - 5.0)


@pytest.mark.parametrize(("others", "tier"), [(["four", "Four.", "five"], "ta"), (["four", "five", "six"], "teacher")])
async def test_an_unsure_student_is_asked_again_where_that_is_proven_to_tell_more(
    running: Running, encoder: Path, others: list[str], tier: str
) -> None:
    surer = Calibrator("platt", 200, a=1.0, b=0.0, reading=Reading(agreement=6.0, agreement_mean=0.0))
    await promote(running, encoder, again=surer)
    running.student.logprob = -1.0
    running.student.in_turn = ["four", *others]
    running.student.core_seconds = 36.0
    response = await running.http.post("/v1/chat/completions", json=ASK)

    assert response.headers["x-tutelage-tier"] == tier
    first, *further = running.student.requests
    assert "temperature" not in first
    assert [(asked["temperature"], asked["seed"], "logprobs" in asked) for asked in further] == [(0.7, seed, False) for seed in range(3)]
    [attempt] = await running.pool.fetch("select reason, cost_microusd from attempts")
    assert f"asked again it agreed in {'0.67' if tier == 'ta' else '0.33'}" in attempt["reason"]
    assert attempt["cost_microusd"] == 4 * 400, "36 core-seconds at $0.04 an hour, for each of four answers"
    if tier == "ta":
        assert float(response.headers["x-tutelage-cost-usd"]) == pytest.approx(0.0016)
    metrics = (await running.http.get("/metrics")).text
    assert "tutelage_student_asked_again_total 1.0" in metrics


async def test_an_unsure_student_is_overruled_by_the_teacher_and_its_attempt_is_kept(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.student.logprob = -1.0
    response = await running.http.post("/v1/chat/completions", json=ASK)

    assert response.json()["choices"][0]["message"]["content"] == "4"
    assert (response.headers["x-tutelage-tier"], response.headers["x-tutelage-route"]) == ("teacher", "cascade")
    attempts = await running.pool.fetch("select answer, accepted, confidence from attempts")
    assert [(a["answer"], a["accepted"]) for a in attempts] == [("four", False)]


async def test_an_answer_of_another_version_than_the_one_in_charge_is_never_served(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.student.fingerprint = "digest-of-yesterday"

    assert (await running.http.post("/v1/chat/completions", json=ASK)).headers["x-tutelage-tier"] == "teacher"


async def test_a_domain_without_a_student_and_a_label_that_says_so_go_to_the_teacher(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    other = {**ASK, "messages": [{"role": "user", "content": COLOURS[0]}]}
    labelled = {**ASK, "metadata": {"domain": "colours"}}

    for body in (other, labelled):
        response = await running.http.post("/v1/chat/completions", json=body)
        assert (response.headers["x-tutelage-domain"], response.headers["x-tutelage-tier"]) == ("colours", "teacher")


async def test_when_the_student_cannot_be_reached_the_teacher_answers(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.student.status = 500

    assert (await running.http.post("/v1/chat/completions", json=ASK)).headers["x-tutelage-tier"] == "teacher"


async def test_when_the_teacher_is_down_a_promoted_student_answers_what_it_can(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.teacher.status, running.student.logprob = 503, -1.0
    served = await running.http.post("/v1/chat/completions", json=ASK)
    refused = await running.http.post("/v1/chat/completions", json={**ASK, "messages": [{"role": "user", "content": COLOURS[0]}]})

    assert (served.status_code, served.headers["x-tutelage-route"]) == (200, "cascade-degraded")
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "unavailable"


async def test_when_the_teacher_is_down_a_mere_student_does_not_answer_what_it_is_unsure_of(running: Running, encoder: Path) -> None:
    await promote(running, encoder, tier="student")
    running.teacher.status, running.student.logprob = 503, -1.0

    assert (await running.http.post("/v1/chat/completions", json=ASK)).status_code == 503


async def test_a_streamed_cascade_gives_the_judged_answer(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    stream = await running.client.chat.completions.create(**ASK, stream=True)

    assert "".join([c.choices[0].delta.content or "" async for c in stream if c.choices]) == "four"


async def test_answers_are_kept_as_long_as_the_version_that_gave_them_is_in_charge(running: Running, encoder: Path) -> None:
    async def cache() -> str:
        return (await running.http.post("/v1/chat/completions", json=ASK)).headers["x-tutelage-cache"]

    assert [await cache(), await cache()] == ["miss", "hit-exact"]  # the teacher's
    await promote(running, encoder)
    assert await cache() == "hit-exact"  # is as good as before
    other = {"messages": [{"role": "user", "content": SUMS[1]}], "model": "auto"}
    first, again = [await running.http.post("/v1/chat/completions", json=other) for _ in range(2)]
    assert [first.headers["x-tutelage-model"], again.headers["x-tutelage-cache"]] == ["acme-sums", "hit-exact"]
    names = {"tenant_id": running.tenant_id, "domain": "sums", "student": "acme-sums", "folder": "/s/v{version}"}
    await registry.spawn(running.pool, cycle_id="c1", **names)
    calibrator = Calibrator("platt", 200, a=1.0, b=0.0).to_dict()
    await registry.complete_version(running.pool, "acme-sums", 2, status="ta", digest="digest-2", calibrator=calibrator, evidence={"n": 1})
    decision = Decision(running.tenant_id, "sums", "promote", "acme-sums", 2, Pointer(2, "acme-sums", 2, "ta"), "is better", {})
    await registry.decide(running.pool, decision, expected=1)
    await until(lambda: running.app.state.watcher.current.view(running.tenant_id).students[0].version == 2)

    assert (await running.http.post("/v1/chat/completions", json=other)).headers["x-tutelage-cache"] == "miss"
    assert await cache() == "hit-exact"


@pytest.mark.parametrize(("model", "tier"), [("big", "teacher"), ("teacher", "teacher"), ("acme-sums", "ta"), ("ta", "ta")])
async def test_a_model_or_tier_can_be_asked_for_by_name(running: Running, encoder: Path, model: str, tier: str) -> None:
    await promote(running, encoder)
    response = await running.http.post("/v1/chat/completions", json={**ASK, "model": model})

    assert (response.status_code, response.headers["x-tutelage-tier"], response.headers["x-tutelage-route"]) == (200, tier, "direct")
    assert model in [m.id for m in (await running.client.models.list()).data]


async def test_a_second_teacher_takes_over_from_a_dead_one(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str, teacher: FakeModelServer
) -> None:
    home.models.joinpath("encoder").symlink_to(encoder)
    dead = {"name": "dead", "kind": "openai", "base_url": "http://127.0.0.1:9/v1"}
    config = configure(home.folder("config"), [dead, entry(teacher)])
    async with serving(home, config, servers, database_url, "http://127.0.0.1:9") as app:
        made = await add_tenant(app.state.pool, home.secret("pepper"), name="acme", tier="pro")
        await until(lambda: made["key_id"] in app.state.watcher.current.keys)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://g", headers={"authorization": f"Bearer {made['key']}"}) as http:
            whole = await http.post("/v1/chat/completions", json=ASK)
            streamed = await http.post("/v1/chat/completions", json={**ASK, "stream": True})

    assert whole.headers["x-tutelage-model"] == "big"
    assert streamed.text.rstrip().endswith("[DONE]")


async def test_missing_usage_is_estimated_and_marked_so(running: Running) -> None:
    running.teacher.usage = False
    response = await running.http.post("/v1/chat/completions", json=ASK)

    assert response.json()["usage"]["prompt_tokens"] > 5
    assert (await rows(running))[0]["tokens_estimated"]


# --- keys and bad input ----------------------------------------------------------------------------------------------


async def test_unknown_malformed_missing_and_operator_keys_are_401(running: Running, home: Home) -> None:
    from tutelage.gateway.keys import mint
    from tutelage.records import Key

    stranger, operator = mint(home.secret("pepper")), mint(home.secret("pepper"))
    await tenants.add_key(running.pool, Key(operator.id, None, "admin", operator.hash, None, None))
    await until(lambda: operator.id in running.app.state.watcher.current.keys)
    for header in ("", "Basic abc", "Bearer nonsense", f"Bearer {running.key[:-1]}x", f"Bearer {stranger.text}", f"Bearer {operator.text}"):
        response = await running.http.post("/v1/chat/completions", json=ASK, headers={"authorization": header})
        assert response.status_code == 401, header
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert running.teacher.requests == []


async def test_a_revoked_key_stops_working_within_a_moment(running: Running) -> None:
    from datetime import UTC, datetime

    await tenants.end_key(running.pool, running.key.split("_")[2], at=datetime.now(UTC), revoke=True)
    await asyncio.sleep(0.3)

    assert (await running.http.post("/v1/chat/completions", json=ASK)).status_code == 401


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{not json", "body"),
        (b"[]", "body"),
        (b'{"model": "auto"}', "messages"),
        (b'{"model": "auto", "messages": []}', "messages"),
        (b'{"model": 7, "messages": [{"role": "user", "content": "x"}]}', "model"),
        (b'{"model": "auto", "messages": [{"role": "wizard", "content": "x"}]}', "messages.0.role"),
        (b'{"model": "auto", "messages": [{"role": "user", "content": "x"}], "temperature": 9}', "temperature"),
        (b'{"model": "auto", "messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}', "max_tokens"),
        (b'{"model": "auto", "messages": [{"role": "user", "content": ""}]}', "messages"),
    ],
)
async def test_a_body_that_cannot_be_right_is_400_and_names_the_field(running: Running, body: bytes, param: str) -> None:
    response = await running.http.post("/v1/chat/completions", content=body)

    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_unknown_model_oversized_body_unknown_path_and_wrong_method_are_4xx_in_openais_shape(running: Running) -> None:
    model = await running.http.post("/v1/chat/completions", json={**ASK, "model": "gpt-99"})
    large = await running.http.post("/v1/chat/completions", json={**ASK, "user": "x" * 30_000})
    path = await running.http.get("/v1/nothing")
    method = await running.http.get("/v1/chat/completions")

    assert [r.status_code for r in (model, large, path, method)] == [404, 413, 404, 405]
    assert model.json()["error"]["code"] == "model_not_found"
    assert "auto" in model.json()["error"]["message"]
    assert all(set(r.json()["error"]) == {"message", "type", "code", "param"} for r in (model, large, path, method))


async def test_a_request_the_teacher_rejects_is_the_clients_fault_not_an_outage(running: Running) -> None:
    running.teacher.status = 422
    response = await running.http.post("/v1/chat/completions", json=ASK)

    assert (response.status_code, response.json()["error"]["code"]) == (422, "upstream_rejected")
    assert len(running.teacher.requests) == 1


async def test_the_teachers_own_credentials_failing_is_an_outage_that_names_no_secret(running: Running) -> None:
    running.teacher.status = 401
    response = await running.http.post("/v1/chat/completions", json=ASK)

    assert response.status_code == 503
    assert "fake failure" not in response.text


async def test_a_temporary_failure_is_tried_again_twice_at_most(running: Running) -> None:
    running.teacher.status = 500
    assert (await running.http.post("/v1/chat/completions", json=ASK)).status_code == 503
    assert len(running.teacher.requests) == 3


# --- feedback, health, metrics -----------------------------------------------------------------------------------------


async def test_feedback_is_kept_and_feedback_on_a_strangers_request_is_404(running: Running) -> None:
    request_id = (await running.http.post("/v1/chat/completions", json=ASK)).headers["x-request-id"]
    kept = await running.http.post("/v1/feedback", json={"request_id": request_id, "score": 1, "label": "4"})
    stranger = await running.http.post("/v1/feedback", json={"request_id": "nobody's", "score": 1})
    wrong = await running.http.post("/v1/feedback", json={"request_id": request_id, "score": 3})

    assert [r.status_code for r in (kept, stranger, wrong)] == [200, 404, 400]
    assert await running.pool.fetchval("select label from feedback where request_id = $1", request_id) == "4"


async def test_health_metrics_and_the_api_description_answer_without_a_key(running: Running) -> None:
    await running.http.post("/v1/chat/completions", json=ASK)
    running.http.headers.pop("authorization")
    live, ready, metrics, described = [
        await running.http.get(path) for path in ("/health/live", "/health/ready", "/metrics", "/openapi.json")
    ]

    assert [r.status_code for r in (live, ready, metrics, described)] == [200] * 4
    assert 'tutelage_requests_total{cache="miss",route="always-teacher",tier="teacher"} 1.0' in metrics.text
    assert "/v1/chat/completions" in described.json()["paths"]


async def test_metrics_tell_cost_latency_and_hits_in_one_number_each_and_what_evolution_brought(running: Running) -> None:
    for _ in range(4):
        await running.http.post("/v1/chat/completions", json=ASK)
    await registry.open_cycle(running.pool, "c1", running.tenant_id)
    for version, accuracy in ((1, 0.7), (2, 0.9)):
        await registry.spawn(running.pool, tenant_id=running.tenant_id, domain="sums", student="acme-sums", cycle_id="c1", folder="/s")
        evidence = {"core_seconds": 30.0, "accuracy": accuracy, "before": 0.2}
        await registry.complete_version(running.pool, "acme-sums", version, status="ta", evidence=evidence)
    serves = registry.Decision(running.tenant_id, "sums", "promote", "acme-sums", 1, registry.Pointer(1, "acme-sums", 1, "ta"), "good", {})
    await registry.decide(running.pool, serves, expected=0)
    await registry.close_cycle(running.pool, "c1", status="finished", summary={})

    async def told() -> dict[str, float]:
        lines = (await running.http.get("/metrics")).text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    for _ in range(200):
        if 'tutelage_evolution_cycles_total{status="finished"}' in (found := await told()):
            break
        await asyncio.sleep(0.1)

    assert found["tutelage_cache_hit_ratio"] == 0.75
    assert found["tutelage_cost_per_query_usd"] == pytest.approx(found['tutelage_cost_usd_total{tier="teacher"}'] / 4)
    quantiles = [found[f'tutelage_request_seconds_quantile{{quantile="{q}"}}'] for q in ("0.5", "0.95", "0.99")]
    assert 0 < quantiles[0] <= quantiles[1] <= quantiles[2]
    assert found['tutelage_promotions_total{action="promote"}'] == found["tutelage_evolution_improvements_total"] == 1
    assert (found["tutelage_distillations_total"], found["tutelage_distillation_core_seconds_total"]) == (2, 60)
    assert (found["tutelage_distillation_gain_count"], found["tutelage_distillation_gain_sum"]) == (2, pytest.approx(1.2))
    assert found['tutelage_student_versions{status="ta"}'] == 2


async def test_a_dead_cache_is_a_miss_and_never_an_error(home: Home, encoder: Path, database_url: str, teacher: FakeModelServer) -> None:
    home.models.joinpath("encoder").symlink_to(encoder)
    nowhere = engines.Engines(database_url, "unix:///nowhere.sock")
    async with serving(home, configure(home.folder("config"), [entry(teacher)]), nowhere, database_url, "http://127.0.0.1:9") as app:
        made = await add_tenant(app.state.pool, home.secret("pepper"), name="acme", tier="pro")
        await until(lambda: made["key_id"] in app.state.watcher.current.keys)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://g", headers={"authorization": f"Bearer {made['key']}"}) as http:
            response = await http.post("/v1/chat/completions", json=ASK)

    assert (response.status_code, response.headers["x-tutelage-cache"]) == (200, "miss")


async def test_embeddings_of_placed_requests_are_kept_for_the_cycle(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    await running.http.post("/v1/chat/completions", json=ASK)

    stored = np.frombuffer((await rows(running))[0]["embedding"], dtype=np.float32)
    assert stored == pytest.approx(Encoder(encoder).encode(["What is 2 + 2?"])[0], abs=1e-5)


async def test_a_pool_to_a_lost_database_refuses_rather_than_acknowledge(running: Running) -> None:
    assert (await running.http.post("/v1/chat/completions", json=ASK)).status_code == 200
    await running.pool.execute("alter table interactions rename to gone")
    response = await running.http.post("/v1/chat/completions", json=ASK)

    assert response.status_code == 503
    assert "recorded" in response.json()["error"]["message"]


# --- sent twice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_idempotency_key_gets_the_same_bytes_one_call_and_one_bill_line(running: Running, stream: bool) -> None:
    asked = {**ASK, "stream": stream, "temperature": 0.7}
    first = await running.http.post("/v1/chat/completions", json=asked, headers={"idempotency-key": "order-1"})
    again = await running.http.post("/v1/chat/completions", json=asked, headers={"idempotency-key": "order-1"})
    assert first.status_code == again.status_code == 200
    assert again.content == first.content
    assert again.headers["x-request-id"] == first.headers["x-request-id"]
    assert again.headers["content-type"] == first.headers["content-type"]
    assert len(running.teacher.requests) == 1
    assert len(await rows(running)) == 1


async def test_an_idempotency_key_with_another_body_is_422_and_another_tenant_has_its_own(running: Running, home: Home) -> None:
    headers = {"idempotency-key": "order-1"}
    assert (await running.http.post("/v1/chat/completions", json=ASK, headers=headers)).status_code == 200
    changed = await running.http.post("/v1/chat/completions", json={**ASK, "max_tokens": 7}, headers=headers)
    assert changed.status_code == 422
    assert changed.json()["error"]["code"] == "idempotency_key_reused"
    other = await add_tenant(running.pool, home.secret("pepper"), name="globex", tier="free")
    await until(lambda: other["key_id"] in running.app.state.watcher.current.keys)
    theirs = await running.http.post(
        "/v1/chat/completions", json={**ASK, "max_tokens": 7}, headers={**headers, "authorization": f"Bearer {other['key']}"}
    )
    assert theirs.status_code == 200
    assert {r["tenant_id"] for r in await rows(running)} == {running.tenant_id, other["tenant_id"]}


async def test_an_idempotency_key_in_use_is_409_and_a_failure_frees_it(running: Running) -> None:
    headers = {"idempotency-key": "order-1"}
    running.teacher.delay = 0.5
    slow = asyncio.create_task(running.http.post("/v1/chat/completions", json=ASK, headers=headers))
    await until(lambda: len(running.teacher.requests) == 1)
    during = await running.http.post("/v1/chat/completions", json=ASK, headers=headers)
    assert during.status_code == 409
    assert int(during.headers["retry-after"]) >= 1
    assert (await slow).status_code == 200
    running.teacher.status = 400
    refused = {"idempotency-key": "order-2"}
    assert (await running.http.post("/v1/chat/completions", json={**ASK, "seed": 1}, headers=refused)).status_code == 400
    running.teacher.status = 200
    assert (await running.http.post("/v1/chat/completions", json={**ASK, "seed": 1}, headers=refused)).status_code == 200


async def test_a_key_whose_holder_died_is_free_once_its_lease_ends_and_the_dead_ones_answer_is_not_recorded(running: Running) -> None:
    key = replies.reply_key(running.tenant_id, "order-1")
    dead = await replies.claim(running.pool, key, fingerprint=b"same", holder="dead", seconds=0.05)
    assert isinstance(dead, replies.Held)
    with pytest.raises(IdempotencyConflict):
        await replies.claim(running.pool, key, fingerprint=b"same", holder="live", seconds=5)
    await asyncio.sleep(0.1)
    live = await replies.claim(running.pool, key, fingerprint=b"same", holder="live", seconds=5)
    assert isinstance(live, replies.Held)
    reply = replies.StoredReply({}, "application/json", b"{}")
    assert not await replies.keep(running.pool, dead, reply)
    assert await replies.keep(running.pool, live, reply)
    assert await replies.claim(running.pool, key, fingerprint=b"same", holder="third", seconds=5) == reply


async def test_feedback_sent_twice_with_one_key_counts_once(running: Running) -> None:
    answered = await running.http.post("/v1/chat/completions", json=ASK)
    body = {"request_id": answered.headers["x-request-id"], "score": 1}
    for _ in range(2):
        told = await running.http.post("/v1/feedback", json=body, headers={"idempotency-key": "f-1"})
        assert told.json()["status"] == "recorded"
    assert await running.pool.fetchval("select count(*) from feedback") == 1


@pytest.mark.parametrize("streams", [0, 2, 5])
async def test_identical_requests_under_way_share_one_call_and_one_bill_line(running: Running, streams: int) -> None:
    running.teacher.delay = 0.3
    asked = [{**ASK, "stream": True}] * streams + [ASK] * (5 - streams)
    answers = await asyncio.gather(*(running.http.post("/v1/chat/completions", json=one) for one in asked))
    assert all("[DONE]" in answer.text for answer in answers[:streams])
    assert {a.status_code for a in answers} == {200}
    assert len(running.teacher.requests) == 1
    recorded = await rows(running)
    assert len(recorded) == 5
    assert sorted(r["cache"] for r in recorded) == ["hit-exact"] * 4 + ["miss"]
    assert sum(r["cost_microusd"] > 0 for r in recorded) == 1


# --- streams that are cut --------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_cancels_the_model_and_pays_for_what_was_said(running: Running, served: str) -> None:
    running.teacher.answer, running.teacher.delay = "abcdefghij" * 20, 0.02
    headers = {"authorization": f"Bearer {running.key}"}
    asked = {**ASK, "stream": True}
    async with httpx.AsyncClient(headers=headers) as http, http.stream("POST", f"{served}/v1/chat/completions", json=asked) as response:
        seen = 0
        async for line in response.aiter_lines():
            seen += line.startswith("data:")
            if seen == 5:
                break
    await until(lambda: running.teacher.left == 1)
    recorded = await until_recorded(running)
    assert recorded["finish_reason"] == "cancelled"
    assert 5 <= len(recorded["answer"]) < 150
    assert recorded["answer"] == running.teacher.answer[: len(recorded["answer"])]
    assert recorded["cost_microusd"] > 0
    assert recorded["tokens_estimated"]


async def test_when_the_client_whose_call_others_share_leaves_the_next_one_asks(running: Running, served: str) -> None:
    running.teacher.answer, running.teacher.delay = "abcdefghij", 0.05
    headers = {"authorization": f"Bearer {running.key}"}
    asked = {**ASK, "stream": True}
    async with httpx.AsyncClient(headers=headers) as http, http.stream("POST", f"{served}/v1/chat/completions", json=asked) as response:
        await anext(response.aiter_lines())
        other = httpx.AsyncClient(headers=headers)
        waiting = asyncio.create_task(other.post(f"{served}/v1/chat/completions", json=ASK))
        await asyncio.sleep(0.1)
    answer = await waiting
    await other.aclose()
    assert answer.json()["choices"][0]["message"]["content"] == "abcdefghij"
    assert len(running.teacher.requests) == 2
    assert sorted(r["finish_reason"] for r in await rows(running)) == ["cancelled", "stop"]


async def test_a_tenant_may_want_the_whole_answer_on_record_when_its_client_leaves(running: Running, served: str) -> None:
    await tenants.change_tenant(running.pool, running.tenant_id, "on_disconnect", "drain")
    await until(lambda: running.app.state.watcher.current.tenants[running.tenant_id].on_disconnect == "drain")
    running.teacher.answer, running.teacher.delay = "abcdefghij" * 3, 0.02
    headers = {"authorization": f"Bearer {running.key}"}
    asked = {**ASK, "stream": True}
    async with httpx.AsyncClient(headers=headers) as http, http.stream("POST", f"{served}/v1/chat/completions", json=asked) as response:
        await anext(response.aiter_lines())
    recorded = await until_recorded(running)
    assert running.teacher.left == 0
    assert (recorded["answer"], recorded["finish_reason"]) == (running.teacher.answer, "stop")


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b"data: {not json\n\n",
        b'data: {"choices": [{"index": 0, "delta": {"content": "c',
        b'data: {"error": {"message": "overloaded"}}\n\ndata: [DONE]\n\n',
        b"data: [DONE]\n\n",
        b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3}}\n\ndata: [DONE]\n\n',
        b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n',
    ],
    ids=[
        "cut",
        "garbled",
        "cut in an event",
        "an error and done",
        "done without a finish",
        "usage without a finish",
        "a finish without done",
    ],
)
async def test_no_stream_that_failed_ends_cleanly(running: Running, tail: bytes) -> None:
    running.teacher.answer, running.teacher.break_after, running.teacher.tail = "abcdef", 3, tail
    with pytest.raises(openai.APIError):
        async for _ in await running.client.chat.completions.create(**ASK, stream=True):
            pass
    response = await running.http.post("/v1/chat/completions", json={**ASK, "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]
    assert events[-1]["error"]["code"] == "upstream_unavailable"
    assert all(choice["finish_reason"] is None for event in events[:-1] for choice in event["choices"])
    recorded = await until_recorded(running)
    assert (recorded["answer"], recorded["finish_reason"]) == ("abc", "error")


async def test_what_a_broken_stream_said_is_on_the_bill(running: Running) -> None:
    running.teacher.answer, running.teacher.break_after = "abcdef", 3
    async with running.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
        text = (await response.aread()).decode()
    assert "[DONE]" not in text
    recorded = await until_recorded(running)
    assert (recorded["answer"], recorded["finish_reason"]) == ("abc", "error")


# --- limits ----------------------------------------------------------------------------------------------------------


async def known(running: Running, holds: Callable[[Any], bool]) -> None:
    """Until the gateway's snapshot shows it."""
    await until(lambda: holds(running.app.state.watcher.current))


async def test_a_limit_reached_is_429_in_openais_shape_says_when_to_return_and_calls_nobody(running: Running) -> None:
    await tenants.change_tenant(running.pool, running.tenant_id, "limits", {"queries_per_day": 2})
    await known(running, lambda s: bool(s.tenants[running.tenant_id].limits))
    for _ in range(2):
        assert (await running.http.post("/v1/chat/completions", json=ASK)).status_code == 200
    with pytest.raises(openai.RateLimitError) as refused:
        await running.client.chat.completions.create(**ASK)
    assert refused.value.code == "daily_quota_exceeded"
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 86_400
    assert len(running.teacher.requests) == 1  # the second was a cache hit, and a query all the same
    assert len(await rows(running)) == 2


async def test_a_request_that_fails_is_no_query(running: Running) -> None:
    await tenants.change_tenant(running.pool, running.tenant_id, "limits", {"queries_per_day": 1})
    await known(running, lambda s: bool(s.tenants[running.tenant_id].limits))
    running.teacher.status = 400
    assert (await running.http.post("/v1/chat/completions", json=ASK)).status_code == 400
    running.teacher.status = 200
    assert (await running.http.post("/v1/chat/completions", json=ASK)).status_code == 200
    assert (await running.http.post("/v1/chat/completions", json=ASK)).status_code == 429


async def test_a_stream_holds_its_slot_until_it_has_ended(running: Running, served: str) -> None:
    await tenants.change_tenant(running.pool, running.tenant_id, "limits", {"concurrent": 1})
    await known(running, lambda s: bool(s.tenants[running.tenant_id].limits))
    running.teacher.answer, running.teacher.delay = "abcdefghij", 0.05
    url, headers = f"{served}/v1/chat/completions", {"authorization": f"Bearer {running.key}"}
    async with httpx.AsyncClient(headers=headers) as http:
        async with http.stream("POST", url, json={**ASK, "stream": True}) as response:
            await anext(response.aiter_lines())
            second = await http.post(url, json={**ASK, "seed": 1})
            assert (second.status_code, second.json()["error"]["code"]) == (429, "concurrency_limit")
        running.teacher.delay = 0
        await until_recorded(running)
        assert (await http.post(url, json={**ASK, "seed": 1})).status_code == 200


async def test_a_suspended_tenant_is_403_and_goes_on_when_resumed(running: Running) -> None:
    for status, expected in (("suspended", 403), ("active", 200)):
        await tenants.change_tenant(running.pool, running.tenant_id, "status", status)
        await known(running, lambda s, status=status: s.tenants[running.tenant_id].status == status)  # type: ignore[misc]
        response = await running.http.post("/v1/chat/completions", json=ASK)
        assert response.status_code == expected
        assert expected == 200 or response.json()["error"]["code"] == "tenant_suspended"


async def test_a_key_names_only_the_models_it_was_made_for(running: Running, home: Home) -> None:
    minted = keys.mint(home.secret("pepper"))
    await tenants.add_key(running.pool, Key(minted.id, running.tenant_id, None, minted.hash, None, None, ["auto"]))
    await known(running, lambda s: minted.id in s.keys)
    headers = {"authorization": f"Bearer {minted.text}"}
    assert (await running.http.post("/v1/chat/completions", json=ASK, headers=headers)).status_code == 200
    refused = await running.http.post("/v1/chat/completions", json={**ASK, "model": "big"}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "model")


# --- embeddings ------------------------------------------------------------------------------------------------------


async def test_the_official_client_gets_embeddings_that_are_on_the_bill_and_not_in_the_traffic_to_learn_from(
    running: Running, encoder: Path
) -> None:
    texts = ["a red rose", "two plus two"]
    got = await running.client.embeddings.create(model="all-minilm-l6-v2", input=texts)
    expected = Encoder(encoder).encode(texts)
    assert np.allclose([item.embedding for item in got.data], expected, atol=1e-6)
    plain = await running.http.post("/v1/embeddings", json={"model": "all-minilm-l6-v2", "input": texts[0]})
    assert np.allclose(plain.json()["data"][0]["embedding"], expected[0], atol=1e-6)
    recorded = await rows(running)
    assert [(r["endpoint"], r["model"], r["messages"]) for r in recorded] == [("embeddings", "all-minilm-l6-v2", None)] * 2
    assert [r["prompt_tokens"] for r in recorded] == [got.usage.prompt_tokens, 3]
    assert await interactions.read_interactions(running.pool, running.tenant_id, limit=10) == []


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "all-minilm-l6-v2", "input": []}, 400, "input"),
        ({"model": "all-minilm-l6-v2", "input": ["a", ""]}, 400, "input"),
        ({"model": "all-minilm-l6-v2", "input": [[1, 2]]}, 400, "input.str"),
        ({"model": "all-minilm-l6-v2", "input": "a", "dimensions": 12}, 400, "dimensions"),
        ({"model": "big", "input": "a"}, 404, "model"),
    ],
)
async def test_an_embeddings_request_that_cannot_be_right_is_refused(running: Running, body: Any, status: int, param: str) -> None:
    refused = await running.http.post("/v1/embeddings", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)


async def test_embeddings_sent_twice_with_one_key_are_made_once(running: Running) -> None:
    body, headers = {"model": "all-minilm-l6-v2", "input": "a red rose"}, {"idempotency-key": "e-1"}
    first, again = [await running.http.post("/v1/embeddings", json=body, headers=headers) for _ in range(2)]
    assert again.content == first.content
    assert again.headers["x-request-id"] == first.headers["x-request-id"]
    assert len(await rows(running)) == 1
