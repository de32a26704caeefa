"""Strategies over HTTP on a real PostgreSQL and Valkey: what is planned, asked, told and recorded; exploration, shadows and policies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import yaml
from fakes import FakeJudge, FakeModelServer
from test_gateway import ASK, COLOURS, SUMS, Running, configure, entry, promote, rows, serving, until

from flows.traffic import find_domains, learn_estimates, tune
from flows.workshop import Cycle
from tutelage.fleet import engines
from tutelage.gateway.limits import strategies
from tutelage.gateway.tenancy import Maker, revert_policy
from tutelage.operations import add_tenant, tuned
from tutelage.records import Outcome
from tutelage.routing.confidence import Calibrator
from tutelage.routing.estimates import Estimate
from tutelage.routing.policy import Policy
from tutelage.routing.promises import Assurance
from tutelage.scoring import wilson
from tutelage.settings import Home, RoutingSettings
from tutelage.stores import bodies, evidence, outcomes, policies, registry, tenants

OTHER: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": COLOURS[0]}]}


@pytest.fixture
def teacher() -> Iterator[FakeModelServer]:
    with FakeModelServer("4") as server:
        yield server


@pytest.fixture
def student() -> Iterator[FakeModelServer]:
    with FakeModelServer("four", logprob=-0.01, fingerprint="digest-1") as server:
        yield server


@pytest.fixture
def small() -> Iterator[FakeModelServer]:
    with FakeModelServer("4") as server:
        yield server


@pytest.fixture
def routing() -> dict[str, Any]:
    """What a test says of routing.yaml; nothing is left to chance unless it says so."""
    return {"explore": 0.0, "shadow": 0.0}


@pytest.fixture
async def running(
    home: Home,
    encoder: Path,
    servers: engines.Engines,
    database_url: str,
    teacher: FakeModelServer,
    student: FakeModelServer,
    small: FakeModelServer,
    routing: dict[str, Any],
) -> AsyncIterator[Running]:
    home.models.joinpath("encoder").symlink_to(encoder)
    cheap = entry(small, "small", tier="ta") | {"price": {"input_per_mtok": 0.1, "output_per_mtok": 0.4}}
    config = configure(home.folder("config"), [entry(teacher), cheap], estimates_seconds=0.05)
    (config / "routing.yaml").write_text(yaml.safe_dump(routing))
    async with serving(home, config, servers, database_url, student.url) as app:
        made = await add_tenant(app.state.pool, home.secret("pepper"), name="acme", tier="pro")
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=30) as http:
            http.headers["authorization"] = f"Bearer {made['key']}"
            client = openai.AsyncOpenAI(api_key=made["key"], base_url="http://gateway/v1", http_client=http, max_retries=0)
            await until(lambda: made["key_id"] in app.state.watcher.current.keys)
            yield Running(http, client, made["key"], made["tenant_id"], app.state.pool, teacher, student, app)


class Known:
    """An estimator that was told everything."""

    models = ("big", "small")

    def __init__(self, **probabilities: float) -> None:
        self._known = {name: Estimate(value, 500, "isotonic", "as told", assured=value) for name, value in probabilities.items()}

    def probability(self, model: str, embedding: np.ndarray, prompt: str, domain: str | None) -> Estimate:
        return self._known.get(model, Estimate(0.0, 0, "unknown", "no outcomes"))

    def probabilities(self, embedding: np.ndarray, prompt: str, domain: str | None) -> dict[str, Estimate]:
        return self._known


async def ask(running: Running, body: dict[str, Any] = ASK, **headers: str) -> httpx.Response:
    sent = {f"x-tutelage-{name.replace('_', '-')}": value for name, value in headers.items()}
    return await running.http.post("/v1/chat/completions", json=body, headers=sent)


async def last(running: Running) -> dict[str, Any]:
    return (await rows(running))[-1]


async def test_quality_is_the_default_and_says_why_in_headers_and_on_record(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    response = await ask(running)
    row = await last(running)
    assert (response.headers["x-tutelage-strategy"], response.headers["x-tutelage-route"]) == ("quality", "cascade")
    assert response.headers["x-tutelage-tier"] == "ta"
    assert "confidence" in response.headers["x-tutelage-reason"] and row["reason"] == response.headers["x-tutelage-reason"]
    assert (row["strategy"], row["propensity"], row["explored"], row["policy_version"]) == ("quality", 1.0, False, 0)
    assert row["similarity"] > 0.5


@pytest.mark.parametrize(
    ("strategy", "model", "route"),
    [
        ("always-teacher", "big", "always-teacher"),
        ("cascade", "acme-sums", "cascade"),
        ("quality", "acme-sums", "cascade"),
        ("direct", "small", "direct"),
        ("parallel", "acme-sums", "cascade"),
        ("budget", "acme-sums", "cascade"),
    ],
)
async def test_each_strategy_can_be_asked_for_by_header(running: Running, encoder: Path, strategy: str, model: str, route: str) -> None:
    await promote(running, encoder)
    running.app.state.estimators[running.tenant_id] = Known(small=0.95)
    more = {"max_cost_usd": "0.01"} if strategy == "budget" else {}
    response = await ask(running, strategy=strategy, **more)
    told = [response.headers[f"x-tutelage-{name}"] for name in ("strategy", "model", "route")]
    assert told == [strategy, model, route]
    assert (await last(running))["strategy"] == strategy


async def test_a_tenants_strategy_holds_and_a_requests_own_stands_before_it(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    await tenants.change_tenant(running.pool, running.tenant_id, "strategy", "always-teacher")
    await until(lambda: running.app.state.watcher.current.tenants[running.tenant_id].strategy == "always-teacher")
    assert (await ask(running)).headers["x-tutelage-model"] == "big"
    assert (await ask(running, strategy="cascade")).headers["x-tutelage-model"] == "acme-sums"


async def test_what_a_plan_does_not_allow_is_403_and_a_tenant_moved_to_it_goes_on_with_quality(running: Running) -> None:
    await tenants.change(running.pool, running.tenant_id, {"tier": "free", "strategy": "parallel"}, actor="test")
    await until(lambda: running.app.state.watcher.current.tenants[running.tenant_id].tier == "free")
    for strategy in ("direct", "parallel", "budget"):
        refused = await ask(running, strategy=strategy)
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "x-tutelage-strategy")
        assert "always-teacher, cascade, quality" in refused.json()["error"]["message"]
    assert (await ask(running)).headers["x-tutelage-strategy"] == "quality"
    assert strategies("free") < strategies("pro") == strategies("enterprise")


@pytest.mark.parametrize(
    ("name", "value"),
    [("strategy", "best"), ("max_cost_usd", "much"), ("max_cost_usd", "0"), ("min_confidence", "1.5"), ("min_confidence", "nan")],
)
async def test_a_wish_that_cannot_be_meant_is_400_and_names_its_header(running: Running, name: str, value: str) -> None:
    refused = await ask(running, **{name: value})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"x-tutelage-{name.replace('_', '-')}")


async def test_a_higher_confidence_asked_for_sends_a_student_that_is_not_so_sure_away(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.student.logprob = -0.1  # confidence 0.905
    assert (await ask(running)).headers["x-tutelage-tier"] == "ta"
    assert (await ask(running, min_confidence="0.95")).headers["x-tutelage-tier"] == "teacher"


async def test_a_stated_minimum_is_promised_of_outcomes_and_the_tenants_holds_for_every_request(running: Running, encoder: Path) -> None:
    await promote(running, encoder, assurance=Assurance((0.0, 4.0), (0.86, 0.97)))
    sure = await ask(running, min_confidence="0.95")
    assert sure.headers["x-tutelage-tier"] == "ta" and "0.950 is promised" in sure.headers["x-tutelage-reason"]
    running.student.logprob = -0.1  # confidence 0.905, but such answers are surely right in 0.86 only
    assert (await ask(running, {**ASK, "seed": 1})).headers["x-tutelage-tier"] == "ta"
    await tenants.change_tenant(running.pool, running.tenant_id, "min_confidence", 0.9)
    await until(lambda: running.app.state.watcher.current.tenants[running.tenant_id].min_confidence == 0.9)
    unsure = await ask(running, {**ASK, "seed": 1})
    assert (unsure.headers["x-tutelage-tier"], unsure.headers["x-tutelage-cache"]) == ("teacher", "miss")
    assert "surely are right in 0.860, 0.900 is promised" in unsure.headers["x-tutelage-reason"]


async def test_a_maximum_cost_chooses_who_can_be_afforded_bounds_the_answer_and_else_is_told(running: Running) -> None:
    body = {**OTHER, "max_tokens": 100}  # big: about 1,030 micro-dollars, small: about 42
    assert (await ask(running, body, max_cost_usd="0.01")).headers["x-tutelage-model"] == "big"
    cheap = await ask(running, body, max_cost_usd="0.0001")
    assert cheap.headers["x-tutelage-model"] == "small"
    open_ended = await ask(running, OTHER, max_cost_usd="0.0001")
    assert open_ended.status_code == 400, "256 tokens of the cheapest model are likely to cost more"
    refused = await ask(running, body, max_cost_usd="0.000001")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-tutelage-max-cost-usd")
    bounded = await ask(running, OTHER, max_cost_usd="0.0027")
    assert bounded.headers["x-tutelage-model"] == "big"
    sent = running.teacher.requests[-1]["max_tokens"]
    assert sent >= 256 and sent * 10 <= 2_700


async def test_a_cheaper_model_that_is_good_enough_by_estimate_takes_over_from_the_teacher(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    assert (await ask(running, OTHER)).headers["x-tutelage-model"] == "big"
    running.app.state.estimators[running.tenant_id] = Known(small=0.95)
    response = await ask(running, {**OTHER, "seed": 1})
    assert (response.headers["x-tutelage-model"], response.headers["x-tutelage-route"]) == ("small", "direct")
    assert "good enough" in response.headers["x-tutelage-reason"]


async def test_a_novel_query_is_asked_of_several_at_once_and_all_are_billed(running: Running) -> None:
    response = await ask(running, strategy="parallel")
    assert (response.headers["x-tutelage-route"], len(running.teacher.requests)) == ("parallel", 1)
    assert "2 of 2 answers agree" in response.headers["x-tutelage-reason"]
    (tried,) = await running.pool.fetch("select model, accepted, cost_microusd from attempts")
    row = await last(running)
    assert (row["model"], tried["model"], tried["accepted"]) == ("big", "small", False)
    assert row["cost_microusd"] == 45 + tried["cost_microusd"] > 45


async def test_one_of_several_that_fails_does_not_fail_the_request(running: Running) -> None:
    running.teacher.status = 500
    response = await ask(running, strategy="parallel")
    assert (response.status_code, response.headers["x-tutelage-model"]) == (200, "small")
    assert (await last(running))["propensity"] is None


@pytest.mark.parametrize("routing", [{"explore": 0.05, "shadow": 0.0}])
async def test_exploration_is_logged_with_its_propensity_in_its_share(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.student.answer = "4"  # as the teacher says, or its confidence would not stay
    for start in range(0, 400, 20):
        await asyncio.gather(*(ask(running, {**ASK, "seed": seed}) for seed in range(start, start + 20)))
    recorded = await rows(running)
    explored = [row for row in recorded if row["explored"]]
    assert 0 < len(explored) < 40, "two thirds of 5 % of 400 change what is asked for"
    given, escalated = 1 - 0.05 / 3, 0.05 / 3
    for row in recorded:
        assert row["propensity"] == pytest.approx(given if row["tier"] == "ta" else escalated)
    assert {row["tier"] for row in recorded} == {"ta", "teacher"}


@pytest.mark.parametrize("routing", [{"explore": 0.05, "shadow": 0.0}])
async def test_what_the_client_asks_for_is_not_experimented_with(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    for seed in range(100):
        assert (await ask(running, {**ASK, "seed": seed}, strategy="quality")).headers["x-tutelage-tier"] == "ta"
    assert {row["propensity"] for row in await rows(running)} == {1.0}


@pytest.mark.parametrize("routing", [{"explore": 0.0, "shadow": 1.0}])
async def test_a_given_answer_is_compared_with_the_teachers_after_the_reply_and_billed_apart(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.teacher.delay = 0.2
    response = await ask(running)
    assert response.headers["x-tutelage-tier"] == "ta" and len(running.teacher.requests) == 0, "the reply did not wait"
    await running.app.state.shadows.settled()
    (outcome,) = await running.pool.fetch("select * from outcomes")
    assert (outcome["value"], outcome["served"], outcome["source"], outcome["observed"]) == (0.0, True, "teacher", 1.0)
    assert (outcome["digest"], outcome["request_id"]) == ("digest-1", response.headers["x-request-id"])
    shadow = next(row for row in await rows(running) if row["endpoint"] == "shadow")
    assert (shadow["cost_microusd"], shadow["messages"], shadow["route"], shadow["model"]) == (45, None, "shadow", "big")
    usage = await running.pool.fetchval("select count(*) from interactions where endpoint <> 'shadow'")
    assert usage == 1


@pytest.mark.parametrize("routing", [{"explore": 0.0, "shadow": 1.0}])
async def test_a_student_that_became_a_teacher_is_still_compared_with_the_teacher(running: Running, encoder: Path) -> None:
    await promote(running, encoder, tier="teacher")
    response = await ask(running)
    assert (response.headers["x-tutelage-tier"], response.headers["x-tutelage-model"]) == ("teacher", "acme-sums")
    await running.app.state.shadows.settled()
    (outcome,) = await running.pool.fetch("select value, served from outcomes")
    assert tuple(outcome) == (0.0, True), "four is not what the teacher says"
    assert len(running.teacher.requests) == 1


async def test_a_try_that_was_not_given_is_compared_for_nothing(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.student.answer, running.student.logprob = "4", -1.0
    assert (await ask(running)).headers["x-tutelage-tier"] == "teacher"
    await running.app.state.shadows.settled()
    (outcome,) = await running.pool.fetch("select value, served, observed from outcomes")
    assert tuple(outcome) == (1.0, False, 1.0)
    assert len(running.teacher.requests) == 1


async def knows(running: Running, wins: int, losses: int, *, kind: str = "knowledge") -> None:
    """The newest cycle says so of sums."""
    told = {"kind": kind, "recalled": {"wins": wins, "ties": 0, "losses": losses}}
    await running.pool.execute(
        "insert into gaps (cycle_id, tenant_id, domain, requests, failure_rate, cost_microusd, priority, decision, reason, detail) "
        "values ('c1', $1, 'sums', 200, 1, 9000, 1, 'retrieve', 'a test', $2)",
        running.tenant_id,
        told,
    )


@pytest.mark.parametrize("routing", [{"explore": 0.0, "shadow": 0.0, "recall_seconds": 0.05}])
async def test_a_gap_of_knowledge_is_answered_by_a_cheaper_model_with_earlier_answers_in_context(
    running: Running, encoder: Path, small: FakeModelServer
) -> None:
    await promote(running, encoder, n=0)
    first = {"model": "auto", "messages": [{"role": "user", "content": SUMS[1]}]}
    assert (await ask(running, first)).headers["x-tutelage-model"] == "big"
    await knows(running, 100, 0)
    await until(lambda: bool(running.app.state.recalling.shelves))
    response = await ask(running)
    assert response.headers["x-tutelage-model"] == "small"
    assert "with earlier answers in context" in response.headers["x-tutelage-reason"]
    assert small.requests[-1]["messages"] == [
        {"role": "user", "content": SUMS[1]},
        {"role": "assistant", "content": "4"},
        *ASK["messages"],
    ]
    assert (await last(running))["messages"] == ASK["messages"], "what was recalled is no part of the request"
    assert (await ask(running, {**ASK, "max_tokens": 100}, max_cost_usd="0.01")).headers["x-tutelage-model"] == "big"
    assert (await ask(running, OTHER)).headers["x-tutelage-model"] == "big", "another domain"

    small.status = 500
    fallback = await ask(running, {**ASK, "seed": 1})
    assert fallback.headers["x-tutelage-model"] == "big"
    assert running.teacher.requests[-1]["messages"] == ASK["messages"], "the teacher needs no help"
    small.status = 200

    await bodies.erase(running.pool, running.tenant_id, actor="test")
    await until(lambda: running.app.state.watcher.current.tenants[running.tenant_id].erasures == 1)
    assert (await ask(running, {**ASK, "seed": 2})).headers["x-tutelage-model"] == "big", "nothing that was erased is said again"


@pytest.mark.parametrize("routing", [{"explore": 0.0, "shadow": 0.0, "recall_seconds": 0.05}])
async def test_knowledge_that_is_too_often_wrong_for_the_promised_quality_is_not_recalled(running: Running, encoder: Path) -> None:
    await promote(running, encoder, n=0)
    await ask(running, {"model": "auto", "messages": [{"role": "user", "content": SUMS[1]}]})
    await knows(running, 90, 10)
    await until(lambda: bool(running.app.state.recalling.shelves))
    assert (await ask(running)).headers["x-tutelage-model"] == "big"


CHECKED = {"kind": "normalised"}


@pytest.mark.parametrize("routing", [{"explore": 0.0, "shadow": 0.0, "verifiers": {"sums": CHECKED}}])
async def test_a_verifier_of_the_domain_says_what_every_try_and_the_answer_are_worth(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.student.logprob = -1.0  # tried and not given
    labelled = {**ASK, "metadata": {"label": "4"}}
    response = await ask(running, labelled)
    assert response.headers["x-tutelage-tier"] == "teacher"
    await running.app.state.shadows.settled()
    found = await running.pool.fetch("select * from outcomes where source = 'verifier' order by id")
    assert [(row["model"], row["digest"], row["value"], row["served"], row["observed"]) for row in found] == [
        ("acme-sums", "digest-1", 0.0, False, 1.0),
        ("big", None, 1.0, True, 1.0),
    ]
    assert found[0]["score"] is not None and {row["request_id"] for row in found} == {response.headers["x-request-id"]}
    assert "metadata" not in running.teacher.requests[-1]


@pytest.mark.parametrize("routing", [{"explore": 0.0, "shadow": 0.0, "verifiers": {"sums": {"kind": "json_schema"}}}])
async def test_an_answer_is_held_to_the_schema_that_its_request_asks_for(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    schema = {"type": "object", "required": ["sum"]}
    shaped = {**ASK, "response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}}
    running.student.answer = '{"sum": 4}'
    await ask(running, shaped)
    running.student.answer = "four"
    await ask(running, {**shaped, "seed": 1})
    await ask(running, {**ASK, "seed": 2})  # says nothing of a right answer
    await running.app.state.shadows.settled()
    assert [row["value"] for row in await running.pool.fetch("select value from outcomes order by id")] == [1.0, 0.0]


async def test_feedback_is_an_outcome_of_the_answer_that_was_given(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    request_id = (await ask(running)).headers["x-request-id"]
    await running.http.post("/v1/feedback", json={"request_id": request_id, "score": 0.0})
    (outcome,) = await running.pool.fetch("select model, digest, value, source from outcomes")
    assert tuple(outcome) == ("acme-sums", "digest-1", 0.0, "feedback")


async def test_a_student_that_breaks_its_promise_is_no_longer_given_traffic_until_it_keeps_it_again(
    running: Running, encoder: Path
) -> None:
    await promote(running, encoder)
    response = await ask(running)
    request_id = response.headers["x-request-id"]

    async def found(value: float, times: int) -> None:
        one = Outcome(running.tenant_id, request_id, "acme-sums", "digest-1", "sums", 4.6, 0.99, value, True, "verifier", 1.0)
        await outcomes.add(running.pool, [one] * times)

    def reliability() -> float:
        return running.app.state.watcher.current.view(running.tenant_id).students[0].calibrator.reliability

    await found(0.0, 10)
    await until(lambda: reliability() < 0.7)
    doubted = await ask(running, {**ASK, "seed": 1})
    assert doubted.headers["x-tutelage-tier"] == "teacher"
    await found(1.0, 400)
    await until(lambda: reliability() > 0.95)
    assert (await ask(running, {**ASK, "seed": 2})).headers["x-tutelage-tier"] == "ta"


async def test_what_was_held_against_a_teacher_counts_by_how_often_users_find_that_one_right(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    request_id = (await ask(running)).headers["x-request-id"]
    facts = (running.tenant_id, request_id)
    agreed = Outcome(*facts, "acme-sums", "digest-1", "sums", 4.6, 0.99, 1.0, True, "teacher", 1.0)
    said = [Outcome(*facts, "big", None, "sums", None, None, float(n > 4), True, "feedback", 1.0) for n in range(100)]
    await outcomes.add(running.pool, [agreed, replace(agreed, source="feedback"), *said])

    found = await outcomes.newest(running.pool, limit=400, teachers=["big"])
    assert found["digest-1"] == [(4.6, pytest.approx(1 / wilson(95, 100).hi)), (4.6, 1.0)]
    assert (await outcomes.newest(running.pool, limit=400, teachers=["another"]))["digest-1"] == [(4.6, 1.0), (4.6, 1.0)]


async def test_a_policy_is_seen_by_a_running_gateway_and_going_back_is_too(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.student.logprob = -0.1  # confidence 0.905
    assert (await ask(running)).headers["x-tutelage-tier"] == "ta"
    changed = {"reason": "a test", "evidence": {"n": 1}, "actor": "test"}
    await policies.append(running.pool, running.tenant_id, {"threshold": 0.95}, expected=0, **changed)

    def version() -> int:
        policy = running.app.state.watcher.current.view(running.tenant_id).policy
        return policy.version if policy else 0

    await until(lambda: version() == 1)
    stricter = await ask(running)
    assert (stricter.headers["x-tutelage-tier"], stricter.headers["x-tutelage-cache"]) == ("teacher", "miss")
    assert (await last(running))["policy_version"] == 1
    tenant = running.app.state.watcher.current.tenants[running.tenant_id]
    await revert_policy(running.pool, tenant, 0, reason="too strict", maker=Maker("test"))
    await until(lambda: version() == 2, seconds=1)
    assert (await ask(running, {**ASK, "seed": 1})).headers["x-tutelage-tier"] == "ta"
    history = await policies.history(running.pool, running.tenant_id)
    assert [(row["version"], row["reason"], row["reverts_to"]) for row in history] == [(2, "too strict", 0), (1, "a test", None)]


async def test_a_tuned_threshold_leaves_the_cached_answers_that_meet_it(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.student.logprob = -0.1  # confidence 0.905
    by_student, by_teacher = ASK, {**ASK, "messages": [{"role": "user", "content": "Why is the sky blue and the evening red?"}]}
    for body, tier in ((by_student, "ta"), (by_teacher, "teacher")):
        assert (await ask(running, body)).headers["x-tutelage-tier"] == tier
    changed = {"reason": "a test", "evidence": {"n": 1}, "actor": "test"}

    def policy() -> Policy | None:
        found: Policy | None = running.app.state.watcher.current.view(running.tenant_id).policy
        return found

    for version, (threshold, kept) in enumerate(((0.8, True), (0.95, False), (0.9, True)), start=1):
        await policies.append(running.pool, running.tenant_id, {"threshold": threshold}, expected=version - 1, **changed)
        await until(lambda: (found := policy()) is not None and found.version == version)  # noqa: B023
        assert (await ask(running, by_teacher)).headers["x-tutelage-cache"] == "hit-exact"
        if kept:
            assert (await ask(running, by_student)).headers["x-tutelage-cache"] == "hit-exact"
    assert len(running.student.requests) == 1


async def test_tuning_proposes_from_what_was_recorded_and_applies_a_version_with_its_evidence(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.student.answer = "4"
    routing = RoutingSettings(explore_floor=0.7)
    tenant = running.app.state.watcher.current.tenants[running.tenant_id]
    few = await tuned(running.pool, tenant, routing, apply=True, maker=Maker("test"))
    assert {row["applied_as"] for row in few} == {None}
    assert "are needed" in few[0]["reason"]
    running.student.logprob = -0.2  # confidence 0.82: tried, not given, and always as the teacher says
    for start in range(0, 140, 20):
        await asyncio.gather(*(ask(running, {**ASK, "seed": seed}) for seed in range(start, start + 20)))
    await running.app.state.shadows.settled()
    proposed = await tuned(running.pool, tenant, routing, apply=True, maker=Maker("test"))
    assert proposed[0]["setting"] == "threshold" and proposed[0]["new"] < 0.82 and proposed[0]["applied_as"] == 1
    (row,) = await policies.history(running.pool, running.tenant_id)
    assert row["settings"]["threshold"] == proposed[0]["new"]
    assert row["evidence"]["threshold"]["at_new"]["effective"] >= 100
    await until(lambda: running.app.state.watcher.current.view(running.tenant_id).policy is not None)
    assert (await ask(running, {"model": "auto", "messages": [{"role": "user", "content": SUMS[3]}]})).headers["x-tutelage-tier"] == "ta"


async def test_cycles_carry_domains_on_and_place_every_request(running: Running, home: Home, encoder: Path, database_url: str) -> None:
    async def say(texts: list[str], **more: Any) -> None:
        for text in texts:
            await ask(running, {"model": "auto", "messages": [{"role": "user", "content": text}], **more})

    async def sizes() -> dict[str, int]:
        found = (await registry.read_domains(running.pool))[running.tenant_id]
        return {record["name"]: record["size"] for record in found}

    cycle = Cycle("c2", running.tenant_id, "acme", home.root, home.root / "config", database_url)
    await say(SUMS[:40], metadata={"domain": "sums"})
    assert await find_domains.fn(cycle) == 40
    assert await sizes() == {"sums": 40}
    await say(SUMS[40:50])
    assert await find_domains.fn(cycle) == 50
    assert await sizes() == {"sums": 50}
    assert {row["domain"] for row in await rows(running)} == {"sums"}
    assert await find_domains.fn(cycle) == 50
    assert await sizes() == {"sums": 50}, "what was read is not read again"


async def test_a_cycle_tunes_by_itself_once_enough_is_on_record_and_says_why(
    running: Running, home: Home, encoder: Path, database_url: str
) -> None:
    await promote(running, encoder)
    cycle = Cycle("c2", running.tenant_id, "acme", home.root, home.root / "config", database_url)
    assert await tune.fn(cycle) is None
    running.student.answer, running.student.logprob = "4", -0.2  # confidence 0.82: tried, not given, and always as the teacher says
    for start in range(0, 140, 20):
        await asyncio.gather(*(ask(running, {**ASK, "seed": seed}) for seed in range(start, start + 20)))
    await running.app.state.shadows.settled()
    assert await tune.fn(cycle) == 1
    (row,) = await policies.history(running.pool, running.tenant_id)
    assert row["actor"] == "cycle:c2" and row["settings"]["threshold"] < 0.82 and "lower the threshold" in row["reason"]
    assert await tune.fn(cycle) is None, "nothing has changed since"
    assert len(await policies.history(running.pool, running.tenant_id)) == 1


def first_read(first: str, second: str) -> str:
    return "FIRST"


def second_read(first: str, second: str) -> str:
    return "SECOND"


def four(first: str, second: str) -> str:
    return "FIRST" if first == "four" else "SECOND"


@pytest.mark.parametrize(("prefers", "value"), [(four, 1.0), (first_read, 1.0)])
async def test_answers_that_differ_are_judged_both_ways_round(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str, teacher: FakeModelServer, student: FakeModelServer,
    prefers: Callable[[str, str], str], value: float,
) -> None:  # fmt: skip
    home.models.joinpath("encoder").symlink_to(encoder)
    with FakeJudge(prefers) as judge:
        config = configure(home.folder("config"), [entry(teacher), entry(judge, "judge", tier="ta", domains=["judging"])])
        named = {"model": "judge", "family": "other", "teacher_families": ["openai"]}
        (config / "routing.yaml").write_text(yaml.safe_dump({"explore": 0.0, "shadow": 1.0, "judge": named}))
        async with serving(home, config, servers, database_url, student.url) as app:
            made = await add_tenant(app.state.pool, home.secret("pepper"), name="acme", tier="pro")
            await until(lambda: made["key_id"] in app.state.watcher.current.keys)
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://g", headers={"authorization": f"Bearer {made['key']}"}
            ) as http:
                client = openai.AsyncOpenAI(api_key=made["key"], base_url="http://g/v1", http_client=http)
                gateway = Running(http, client, made["key"], made["tenant_id"], app.state.pool, teacher, student, app)
                await promote(gateway, encoder)
                assert (await ask(gateway)).headers["x-tutelage-tier"] == "ta"
                await app.state.shadows.settled()
                (outcome,) = await gateway.pool.fetch("select value, source from outcomes")
    assert tuple(outcome) == (value, "judge")
    assert len(judge.requests) == 2
    places = [request["messages"][-1]["content"].index("four") for request in judge.requests]
    assert places[0] != places[1]


async def test_a_judge_that_is_down_says_nothing_of_an_answer(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str, teacher: FakeModelServer, student: FakeModelServer
) -> None:
    home.models.joinpath("encoder").symlink_to(encoder)
    with FakeJudge(first_read) as judge:
        judge.status = 500
        config = configure(home.folder("config"), [entry(teacher), entry(judge, "judge", tier="ta", domains=["judging"])])
        named = {"model": "judge", "family": "other", "teacher_families": ["openai"]}
        (config / "routing.yaml").write_text(yaml.safe_dump({"explore": 0.0, "shadow": 1.0, "judge": named}))
        async with serving(home, config, servers, database_url, student.url) as app:
            made = await add_tenant(app.state.pool, home.secret("pepper"), name="acme", tier="pro")
            await until(lambda: made["key_id"] in app.state.watcher.current.keys)
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            authorization = {"authorization": f"Bearer {made['key']}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://g", headers=authorization) as http:
                client = openai.AsyncOpenAI(api_key=made["key"], base_url="http://g/v1", http_client=http)
                gateway = Running(http, client, made["key"], made["tenant_id"], app.state.pool, teacher, student, app)
                await promote(gateway, encoder)
                assert (await ask(gateway)).headers["x-tutelage-tier"] == "ta"
                await app.state.shadows.settled()
                assert await gateway.pool.fetchval("select count(*) from outcomes") == 0


@pytest.mark.parametrize(("prefers", "verdict"), [(first_read, "right"), (second_read, "right"), (four, "wrong")])
async def test_the_judge_decides_whether_a_kept_answer_in_other_words_was_right(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str, teacher: FakeModelServer, student: FakeModelServer,
    prefers: Callable[[str, str], str], verdict: str,
) -> None:  # fmt: skip
    home.models.joinpath("encoder").symlink_to(encoder)
    with FakeJudge(prefers) as judge:
        config = configure(
            home.folder("config"), [entry(teacher), entry(judge, "judge", tier="ta", domains=["judging"])], semantic_seconds=0.05
        )
        named = {"model": "judge", "family": "other", "teacher_families": ["openai"]}
        (config / "routing.yaml").write_text(yaml.safe_dump({"explore": 0.0, "shadow": 0.0, "judge": named}))
        async with serving(home, config, servers, database_url, student.url) as app:
            made = await add_tenant(app.state.pool, home.secret("pepper"), name="acme", tier="pro")
            await until(lambda: made["key_id"] in app.state.watcher.current.keys)
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            authorization = {"authorization": f"Bearer {made['key']}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://g", headers=authorization) as http:
                semantic = app.state.semantic

                async def say(question: str, answer: str) -> None:
                    teacher.answer = answer
                    await http.post("/v1/chat/completions", json={"model": "auto", "messages": [{"role": "user", "content": question}]})

                await say("How do I reset the router?", "Hold the button.")
                await until(lambda: len(semantic._tenant(made["tenant_id"]).neighbours) == 1, seconds=20)
                await say("How can I reset the router?", "four")
                counted = semantic.statistics[made["tenant_id"]]
                await until(lambda: counted[f"verified-{verdict}"] == 1)
                bill = await app.state.pool.fetch("select reason from interactions where endpoint = 'shadow'")
    assert len(judge.requests) == len(bill) == 2
    assert all("judged a kept answer" in row["reason"] for row in bill)


# --- a challenger on its way ---------------------------------------------------------------------------------------------


async def challenge(running: Running, percent: int) -> None:
    """Version 2 answers so many percent of sums."""
    await registry.spawn(
        running.pool, tenant_id=running.tenant_id, domain="sums", student="acme-sums", cycle_id="c1", folder="/s/v{version}"
    )
    calibrator = Calibrator("platt", 200, a=1.0, b=0.0).to_dict()
    await registry.complete_version(
        running.pool, "acme-sums", 2, status="challenger", digest="digest-2", calibrator=calibrator, evidence={}
    )
    await evidence.begin_rollout(running.pool, evidence.Rollout(running.tenant_id, "sums", "acme-sums", 2, percent, "ta"))
    await until(lambda: "sums" in running.app.state.watcher.current.view(running.tenant_id).challengers)


async def attempts(running: Running) -> list[tuple[int, str, bool]]:
    found = await running.pool.fetch("select position, digest, accepted from attempts order by position")
    return [(row["position"], row["digest"], row["accepted"]) for row in found]


async def test_a_challenger_answers_its_share_of_the_requests(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    await challenge(running, 100)
    running.student.fingerprint = "digest-2"
    response = await ask(running)
    assert response.headers["x-tutelage-tier"] == "ta"
    assert await attempts(running) == [(0, "digest-2", True)]


@pytest.mark.parametrize(("named", "percent", "version"), [("ta", 100, 2), ("ta", 0, 1), ("acme-sums", 100, 2), ("acme-sums.v1", 100, 1)])
async def test_a_tier_or_a_student_by_name_is_whoever_serves_it_now_and_an_adapter_that_version(
    running: Running, encoder: Path, named: str, percent: int, version: int
) -> None:
    await promote(running, encoder)
    await challenge(running, percent)
    response = await ask(running, {**ASK, "model": named})
    assert response.headers["x-tutelage-tier"] == "ta"
    assert running.student.requests[-1]["model"] == f"acme-sums.v{version}"
    (tried,) = await running.pool.fetch("select model, digest, accepted from attempts")
    assert tuple(tried) == (f"acme-sums.v{version}", f"digest-{version}", True), "whose answer it was is on record"


async def test_a_tier_without_a_student_of_the_domain_is_its_first_configured_model(running: Running) -> None:
    assert (await ask(running, {**OTHER, "model": "ta"})).headers["x-tutelage-model"] == "small"
    refused = await ask(running, {**OTHER, "model": "student"})
    assert (refused.status_code, "no student answers" in refused.json()["error"]["message"]) == (404, True)


@pytest.mark.parametrize("routing", [{"explore": 0.0, "shadow": 0.0, "shadow_challenger": 1.0}])
async def test_a_challenger_in_shadow_is_asked_beside_the_champion_and_never_given(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    await challenge(running, 0)
    response = await ask(running)
    await running.app.state.shadows.settled()
    assert response.headers["x-tutelage-tier"] == "ta"
    assert await attempts(running) == [(0, "digest-1", True), (1, "digest-2", False)]
    assert [row["endpoint"] for row in await rows(running)] == ["chat", "shadow"]


@pytest.mark.parametrize("routing", [{"explore": 0.0, "shadow": 1.0, "shadow_challenger": 1.0}])
async def test_where_the_teacher_is_asked_beside_a_champion_a_challenger_is_too_and_both_are_compared(
    running: Running, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"acme-sums.v1": ("four", "digest-1"), "acme-sums.v2": ("4", "digest-2")}
    monkeypatch.setattr(running.student, "says", lambda asked: held[asked["model"]])
    await promote(running, encoder)
    await challenge(running, 0)
    response = await ask(running)
    await running.app.state.shadows.settled()
    assert response.json()["choices"][0]["message"]["content"] == "four"
    found = await running.pool.fetch("select digest, value, served, source, observed from outcomes order by id")
    assert [tuple(row) for row in found] == [("digest-1", 0.0, True, "teacher", 1.0), ("digest-2", 1.0, False, "teacher", 1.0)]
    assert len(running.teacher.requests) == 1, "one answer of the teacher does for both"


@pytest.mark.parametrize("routing", [{"explore": 0.0, "shadow": 0.25, "shadow_challenger": 0.5}])
async def test_comparisons_tell_with_which_probability_they_were_made(
    running: Running, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"acme-sums.v1": ("four", "digest-1"), "acme-sums.v2": ("4", "digest-2")}
    monkeypatch.setattr(running.student, "says", lambda asked: held[asked["model"]])
    monkeypatch.setattr(running.app.state.shadows, "_random", type("Low", (), {"random": staticmethod(lambda: 0.2)}))
    await promote(running, encoder)
    await challenge(running, 0)
    await ask(running)
    await running.app.state.shadows.settled()
    running.student.logprob = -1.0  # the champion is not sure enough: the teacher's answer is there
    await ask(running, {**ASK, "seed": 1})
    await running.app.state.shadows.settled()
    found = await running.pool.fetch("select digest, observed from outcomes order by id")
    assert [tuple(row) for row in found] == [("digest-1", 0.25), ("digest-2", 0.25), ("digest-1", 1.0), ("digest-2", 0.5)]


# --- a student that fails ------------------------------------------------------------------------------------------------


async def test_a_students_own_failure_is_on_record_against_it_and_not_against_the_tier(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    running.student.status = 500
    for seed in range(8):
        assert (await ask(running, {**ASK, "seed": seed})).headers["x-tutelage-tier"] == "teacher"
    found = await running.pool.fetch("select digest, accepted, reason, score from attempts")
    assert len(found) == len(running.student.requests) == 8, "it is asked again each time, and once"
    assert {tuple(row) for row in found} == {("digest-1", False, "failed: model tier failed: HTTP 500", None)}


async def test_a_tier_that_is_overloaded_or_gone_stands_against_no_student(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    for status in (503, 429, 404):
        running.student.status = status
        assert (await ask(running, {**ASK, "seed": status})).headers["x-tutelage-tier"] == "teacher"
    assert await running.pool.fetchval("select count(*) from attempts") == 0


@pytest.mark.parametrize("routing", [{"explore": 0.0, "shadow": 1.0}])
async def test_a_student_in_training_is_asked_in_the_teachers_shadow_and_never_given(running: Running, encoder: Path) -> None:
    await promote(running, encoder)
    facts = {"tenant_id": running.tenant_id, "domain": "colours", "student": "acme-colours", "cycle_id": "c1", "folder": "/s"}
    await registry.begin_with(running.pool, "acme-colours", await registry.spawn(running.pool, **facts), digest="fresh-1")
    await until(lambda: "colours" in running.app.state.watcher.current.view(running.tenant_id).spawned)
    running.student.fingerprint = "fresh-1"
    response = await ask(running, {"model": "auto", "messages": [{"role": "user", "content": COLOURS[3]}]})
    await running.app.state.shadows.settled()

    assert response.headers["x-tutelage-tier"] == "teacher"
    assert running.student.requests[-1]["model"] == "acme-colours.v1"
    found = await running.pool.fetch("select model, digest, served, domain from outcomes")
    assert [tuple(row) for row in found] == [("acme-colours", "fresh-1", False, "colours")]
    assert await attempts(running) == []
    await registry.complete_version(running.pool, "acme-colours", 1, status="refused")
    await tenants.change_tenant(running.pool, running.tenant_id, "strategy", "quality")
    await until(lambda: not running.app.state.watcher.current.view(running.tenant_id).spawned)


# --- what cycles learn of models -----------------------------------------------------------------------------------------


async def test_a_cycle_learns_from_outcomes_which_model_is_good_enough_and_gateways_ask_it(
    running: Running, home: Home, encoder: Path, database_url: str
) -> None:
    await promote(running, encoder)
    for text in SUMS[:30]:
        await ask(running, {"model": "small", "messages": [{"role": "user", "content": text}]})
    found = [row["request_id"] for row in await rows(running)]
    facts = {"model": "small", "digest": None, "domain": "sums", "score": None, "confidence": None, "served": True, "observed": 1.0}
    told = [Outcome(running.tenant_id, request_id, value=1.0, source="judge", **facts) for request_id in found]
    await outcomes.add(running.pool, told)
    before = await ask(running, strategy="direct")

    cycle = Cycle("c2", running.tenant_id, "acme", home.root, home.root / "config", database_url)
    assert await learn_estimates.fn(cycle) == 30
    await until(lambda: running.tenant_id in running.app.state.estimators)
    after = await ask(running, OTHER | {"messages": [{"role": "user", "content": SUMS[31]}]}, strategy="direct")
    assert (before.headers["x-tutelage-model"], after.headers["x-tutelage-model"]) == ("acme-sums", "small")

    await bodies.erase(running.pool, running.tenant_id, actor="test")
    await until(lambda: running.tenant_id not in running.app.state.estimators)
