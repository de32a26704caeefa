"""/admin/v1 over HTTP on a real PostgreSQL and Valkey: who may do what, what it does, and what the audit chain tells of it."""

from __future__ import annotations

import asyncio
import csv
import io
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import yaml
from fakes import FakeModelServer

from tutelage.fleet import engines
from tutelage.gateway import app as gateway
from tutelage.gateway import keys, roles
from tutelage.gateway.admin.installation import without_values
from tutelage.records import Interaction, Key, Tenant
from tutelage.settings import Home
from tutelage.stores import audit, bodies, interactions, policies, registry, tenants
from tutelage.stores.database import Pool

ASK: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}
SOON = 5.0  # seconds within which a change holds everywhere


@dataclass
class Running:
    """A gateway in this process, two tenants, and the text of a key for everybody who may ask."""

    http: httpx.AsyncClient
    pool: Pool
    app: Any
    home: Home
    keys: dict[str, Key] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    async def mint(self, name: str, tenant_id: str | None, role: str | None, **scope: Any) -> Key:
        minted = keys.mint(self.home.secret("pepper"))
        made = Key(minted.id, tenant_id, role, minted.hash, scope.pop("expires_at", None), None, **scope)
        await tenants.add_key(self.pool, made)
        self.keys[name], self.texts[name] = made, minted.text
        return made

    async def call(self, who: str | None, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.texts.get(who, who)}"} if who else {}
        return await self.http.request(method, path if path.startswith("/v1") else f"/admin/v1{path}", headers=headers, **more)

    async def known(self, name: str) -> None:
        key_id = self.keys[name].id
        await until(lambda: key_id in self.app.state.watcher.current.keys)


async def until(holds: Callable[[], bool], *, seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not become so in time"
        await asyncio.sleep(0.02)


async def until_status(ask: Callable[[], Any], status: int, *, seconds: float = 30) -> float:
    """Seconds until a request is answered with this status."""
    began = time.monotonic()
    while (found := (await ask()).status_code) != status:
        assert time.monotonic() - began < seconds, f"still {found}"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture
def teacher() -> Iterator[FakeModelServer]:
    with FakeModelServer("4") as server:
        yield server


@pytest.fixture
async def running(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str, teacher: FakeModelServer
) -> AsyncIterator[Running]:
    home.models.joinpath("encoder").symlink_to(encoder)
    config = home.folder("config")
    price = {"input_per_mtok": 2.5, "output_per_mtok": 10.0}
    model = {"name": "big", "kind": "openai", "base_url": f"{teacher.url}/v1".replace("//", "//user:hidden@"), "price": price}
    (config / "models.yaml").write_text(yaml.safe_dump({"models": [model]}))
    (config / "gateway.yaml").write_text(yaml.safe_dump({"heads_seconds": 0.2, "storage_seconds": 0.1, "gauge_seconds": 0.05}))
    app = gateway.build(home, config_dir=config, database_url=database_url, valkey_url=servers.valkey_url, tier_url=None)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60) as http,
    ):
        made = Running(http, app.state.pool, app, home)
        for tenant_id, name in (("ten_a", "acme"), ("ten_b", "bolt")):
            await tenants.create_tenant(made.pool, Tenant(tenant_id, name, "pro"))
            await made.mint(name, tenant_id, None)
            for role in roles.ROLES:
                await made.mint(f"{name} {role}", tenant_id, role)
        for role in roles.ROLES:
            await made.mint(role, None, role)
        await made.known("viewer")
        yield made


def interaction(**changes: Any) -> Interaction:
    values: dict[str, Any] = {
        "request_id": uuid.uuid4().hex, "tenant_id": "ten_a", "key_id": "k1", "created_at": datetime(2026, 6, 1, 12, tzinfo=UTC),
        "messages": [{"role": "user", "content": "a private question"}], "prompt_hash": b"h", "answer": "an answer", "model": "big",
        "tier": "teacher", "route": "direct", "reason": "", "cache": "miss", "domain": "sums", "given_domain": None, "confidence": None,
        "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2, "tokens_estimated": False, "cost_microusd": 7, "latency_ms": 5,
    }  # fmt: skip
    return Interaction(**(values | changes))


async def record(pool: Pool, *rows: Interaction) -> None:
    writing = interactions.Recorder(pool, flush_seconds=0.001, batch_rows=50, deadline_seconds=30)
    writing.start()
    await asyncio.gather(*(writing.record(row) for row in rows))
    await writing.stop()


# --- who may -----------------------------------------------------------------------------------------------------

BODIES: dict[str, Any] = {
    "post_/tenants": lambda: {"name": f"t{uuid.uuid4().hex[:8]}"},
    "post_/operators": lambda: {"role": "viewer"},
    "post_/tenants/{tenant}/policies/revert": lambda: {"version": 0, "reason": "as configured"},
}
EVERYBODY = [None, *roles.ROLES, *(f"{name}{role}" for name in ("acme", "bolt") for role in ("", *(f" {r}" for r in roles.ROLES)))]


def expected(key: Key | None, action: Any, of: str | None, good: int) -> int:
    """What the pure rule says, as a status."""
    if key is None:
        return 401
    first = roles.may(key, action, of=key.tenant_id)
    if not first.allowed:
        return 403
    return 404 if roles.may(key, action, of=of).hidden else good


async def test_every_route_answers_everybody_as_the_rule_says(running: Running) -> None:
    told = (await running.http.get("/openapi.json")).json()["paths"]
    routes = [(method, path, one) for path, methods in told.items() if path.startswith("/admin") for method, one in methods.items()]
    assert len(routes) == 24
    actions = {one["x-tutelage-action"] for _, _, one in routes}
    assert actions == set(roles.ACTIONS) - {"tenants.plan"}, "every action has a route; that of a plan is told by a field"
    wrong = []
    for method, path, one in routes:
        for who in EVERYBODY:
            key = running.keys[who] if who else None
            status, wanted = await walk(running, method, path, one, who, key)
            if status != wanted:
                wrong.append((method, path, who, status, wanted))
    assert not wrong


async def walk(running: Running, method: str, path: str, one: dict[str, Any], who: str | None, key: Key | None) -> tuple[int, int]:
    """The status of one route for one caller, and what the rule says. Its target belongs to acme, unless an operator may break it."""
    tenant_id = "ten_a"
    if "{" in path and key is not None and key.tenant_id is None:
        tenant_id = f"ten_{uuid.uuid4().hex[:8]}"
        await tenants.create_tenant(running.pool, Tenant(tenant_id, tenant_id, "pro"))
    target = await running.mint("target", tenant_id, None)
    about_own = "{" not in path  # without a path or a query to say otherwise, it is about whoever asks
    of = (key.tenant_id if key else None) if about_own else tenant_id
    action = one["x-tutelage-action"]
    good = min(int(status) for status in one["responses"])
    filled = path.replace("{tenant}", tenant_id).replace("{key_id}", target.id).removeprefix("/admin/v1")
    body = {"json": BODIES.get(f"{method}_{path.removeprefix('/admin/v1')}", dict)()} if method in ("post", "patch") else {}
    response = await running.call(who, method.upper(), filled, **body)
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "code", "param"}
    return response.status_code, expected(key, action, of, good)


async def test_another_tenants_reports_look_as_if_nobody_were_there(running: Running) -> None:
    for path in ("/usage", "/gaps", "/billing", "/audit", "/audit/verify", "/audit/heads"):
        for named in ("ten_b", "bolt", "nobody"):
            response = await running.call("acme admin", "GET", path, params={"tenant": named})
            assert (response.status_code, response.json()["error"]["message"]) == (404, f"no tenant {named!r}")
        for named in ("ten_a", "acme"):
            assert (await running.call("acme admin", "GET", path, params={"tenant": named})).status_code == 200


async def test_a_tenants_listings_hold_nothing_of_another(running: Running) -> None:
    await record(running.pool, interaction(), interaction(tenant_id="ten_b", domain="secret plans", model="bolts own"))
    for path in (
        "/tenants",
        "/tenants/acme/keys",
        "/usage",
        "/gaps",
        "/billing?month=2026-06",
        "/audit",
        "/audit/heads",
        "/usage?format=csv",
    ):
        response = await running.call("acme admin", "GET", path)
        assert response.status_code == 200
        for foreign in ("ten_b", "bolt", "secret plans"):
            assert foreign not in response.text


async def test_a_gap_is_there_with_the_answer_that_reveals_it(running: Running) -> None:
    now = datetime.now(UTC)
    await record(running.pool, *(interaction(created_at=now, messages=[{"role": "user", "content": f"{n}"}]) for n in range(99)))
    before = (await running.call("acme viewer", "GET", "/gaps")).json()["data"]
    await record(running.pool, interaction(created_at=now), interaction(created_at=now, domain=None))
    after = (await running.call("acme viewer", "GET", "/gaps")).json()["data"]

    assert [(gap["domain"], gap["requests"], gap["decision"]) for gap in before] == [("sums", 99, "wait")]
    assert [(gap["domain"], gap["requests"], gap["decision"]) for gap in after] == [("sums", 100, "train"), (None, 1, "wait")]
    assert "fit no domain yet" in after[1]["reason"]


async def test_a_tenant_changes_its_own_settings_and_never_its_plan(running: Running) -> None:
    changed = await running.call("acme admin", "PATCH", "/tenants/acme", json={"bodies": "redacted", "retention_days": 30})
    assert (changed.status_code, changed.json()["bodies"], changed.json()["retention_days"]) == (200, "redacted", 30)
    for plan in ({"tier": "enterprise"}, {"limits": {"queries_per_day": None}}, {"bodies": "full", "tier": "enterprise"}):
        assert (await running.call("acme admin", "PATCH", "/tenants/acme", json=plan)).status_code == 403
    lifted = await running.call(
        "admin", "PATCH", "/tenants/acme", json={"tier": "free", "limits": {"concurrent": None}, "retention_days": None}
    )
    body = lifted.json()
    assert (body["tier"], body["limits"]["concurrent"], body["limits"]["queries_per_day"]) == ("free", None, 1_000)
    assert (body["retention_days"], body["bodies"]) == (None, "redacted")


WRONG_BODIES: list[tuple[str, str, Any, str]] = [
    ("POST", "/tenants", {"name": "x", "teir": "pro"}, "teir"),
    ("POST", "/tenants", {"name": "x\0y"}, "name"),
    ("POST", "/tenants", {"name": "ok\n"}, "name"),
    ("POST", "/tenants", {"name": "x", "limits": {"queries": 1}}, "limits.queries"),
    ("POST", "/tenants", {"name": "x", "limits": {"concurrent": 10**30}}, "limits.concurrent"),
    ("POST", "/tenants", {}, "name"),
    ("POST", "/tenants", [], "body"),
    ("PATCH", "/tenants/acme", {"retention_days": 0}, "retention_days"),
    ("POST", "/tenants/acme/keys", {"routes": ["admin"]}, "routes.0"),
    ("POST", "/tenants/acme/keys", {"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
    ("POST", "/tenants/acme/keys", {"expires_at": "9999-12-31T23:59:59-10:00"}, "expires_at"),
    ("POST", "/tenants/acme/keys", {"limits": {"spend_per_month_microusd": -1}}, "limits.spend_per_month_microusd"),
    ("POST", "/tenants/acme/keys", {"models": ["a\0b"]}, "models.0"),
    ("POST", "/tenants/acme/suspend", {"why": "late"}, "why"),
    ("POST", "/operators", {"role": "root"}, "role"),
    ("PATCH", "/tenants/acme", {"strategy": "guess"}, "strategy"),
    ("PATCH", "/tenants/acme", {"max_cost_microusd": 0}, "max_cost_microusd"),
    ("PATCH", "/tenants/acme", {"min_confidence": 0}, "min_confidence"),
    ("PATCH", "/tenants/acme", {"min_confidence": True}, "min_confidence"),
    ("POST", "/tenants/acme/policies/revert", {"version": -1, "reason": "x"}, "version"),
    ("POST", "/tenants/acme/policies/revert", {"version": 1}, "reason"),
]


async def test_a_body_that_cannot_be_right_is_400_and_names_the_field(running: Running) -> None:
    for method, path, body, param in WRONG_BODIES:
        response = await running.call("admin", method, path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), body


WRONG_QUERIES = (
    "/usage?by=secret", "/usage?first_day=9999-12-31", "/usage?limit=0", "/usage?limit=1&limit=2", "/usage?teh=1", "/usage?model=a%00b",
    "/audit?before=0", "/audit?limit=100000", "/billing?month=2026-13", "/tenants?after=%00", "/backends?all=1",
)  # fmt: skip


async def test_a_query_that_cannot_be_right_is_400(running: Running) -> None:
    for path in WRONG_QUERIES:
        assert (await running.call("admin", "GET", path)).status_code == 400, path


async def test_names_that_cannot_be_are_404(running: Running) -> None:
    for path in ("/tenants/%00", "/tenants/no%0Abody", "/tenants/ghost/keys"):
        assert (await running.call("admin", "GET", path)).status_code == 404
    for key_id in ("%00", "0" * 12, "not-a-key"):
        assert (await running.call("admin", "POST", f"/keys/{key_id}/revoke")).status_code == 404


async def test_openapi_is_whole(running: Running) -> None:
    told = (await running.http.get("/openapi.json")).json()
    names = set(told["components"]["schemas"])

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, part in value.items():
                if key == "$ref":
                    yield part
                yield from references(part)
        elif isinstance(value, list):
            for part in value:
                yield from references(part)

    missing = {ref for ref in references(told) if ref.removeprefix("#/components/schemas/") not in names}
    assert not missing
    operations = [one["operationId"] for path, methods in told["paths"].items() if path.startswith("/admin") for one in methods.values()]
    assert len(set(operations)) == len(operations)


# --- tenants and keys ----------------------------------------------------------------------------------------------


async def test_a_tenant_is_created_with_a_key_that_works_and_its_name_is_taken_once(running: Running) -> None:
    made = await running.call("admin", "POST", "/tenants", json={"name": "newco", "tier": "free", "limits": {"models": 7}})
    assert made.status_code == 201
    body = made.json()
    assert (body["tenant"]["models"], body["tenant"]["limits"]["concurrent"]) == ({"used": 0, "limit": 7}, 5)
    assert await until_status(lambda: running.call(body["key"], "POST", "/v1/chat/completions", json=ASK), 200) < SOON
    again = await running.call("admin", "POST", "/tenants", json={"name": "newco"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")


async def test_a_revoked_key_opens_nothing_after_a_moment(running: Running) -> None:
    key = running.keys["acme"]
    assert (await running.call("acme", "GET", "/v1/models")).status_code == 200
    revoked = await running.call("acme admin", "POST", f"/keys/{key.id}/revoke")
    assert (revoked.status_code, revoked.json()["status"]) == (200, "revoked")
    assert await until_status(lambda: running.call("acme", "GET", "/v1/models"), 401) < SOON
    assert (await running.call("acme", "POST", "/v1/chat/completions", json=ASK)).status_code == 401


async def test_revoking_again_does_not_move_the_time_of_the_first(running: Running) -> None:
    key = running.keys["acme"]
    first, second = [(await running.call("admin", "POST", f"/keys/{key.id}/revoke")).json()["revoked_at"] for _ in range(2)]
    assert first == second


async def test_an_operator_that_was_revoked_does_nothing_more(running: Running) -> None:
    await running.call("admin", "POST", f"/keys/{running.keys['viewer'].id}/revoke")
    assert await until_status(lambda: running.call("viewer", "GET", "/tenants"), 401) < SOON


async def test_both_keys_open_during_a_rotation_and_the_old_one_ends_after_it(running: Running) -> None:
    key = running.keys["acme"]
    rotated = (await running.call("acme admin", "POST", f"/keys/{key.id}/rotate", json={"overlap_seconds": 3})).json()
    new = rotated["new"]["key"]
    assert await until_status(lambda: running.call(new, "GET", "/v1/models"), 200) < SOON
    assert (await running.call("acme", "GET", "/v1/models")).status_code == 200
    await until_status(lambda: running.call("acme", "GET", "/v1/models"), 401)
    assert (await running.call(new, "GET", "/v1/models")).status_code == 200
    again = await running.call("acme admin", "POST", f"/keys/{key.id}/rotate", json={})
    assert again.status_code == 409


async def test_a_key_uses_only_the_routes_it_was_made_for(running: Running) -> None:
    made = await running.call("acme admin", "POST", "/tenants/acme/keys", json={"routes": ["models", "feedback"]})
    key = made.json()["key"]
    assert await until_status(lambda: running.call(key, "GET", "/v1/models"), 200) < SOON
    refused = await running.call(key, "POST", "/v1/chat/completions", json=ASK)
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert "feedback, models" in refused.json()["error"]["message"]
    assert (await running.call(key, "POST", "/v1/embeddings", json={"model": "x", "input": "y"})).status_code == 403


async def test_a_key_spends_no_more_than_it_was_given(running: Running) -> None:
    made = await running.call("admin", "POST", "/tenants/acme/keys", json={"limits": {"spend_per_month_microusd": 1}})
    key = made.json()["key"]
    await until_status(lambda: running.call(key, "GET", "/v1/models"), 200)
    refused = await running.call(key, "POST", "/v1/chat/completions", json=ASK)
    assert refused.status_code == 429
    assert "spend" in refused.json()["error"]["code"]


async def test_no_key_makes_one_that_opens_more_than_itself(running: Running) -> None:
    ends = datetime.now(UTC) + timedelta(days=1)
    limits = {"spend_per_month_microusd": 100}
    await running.mint("narrow", "ten_a", "admin", models=["auto"], routes=["chat"], limits=limits, expires_at=ends)
    await running.known("narrow")
    made = await running.call("narrow", "POST", "/tenants/acme/keys", json={})
    inherited = made.json()
    assert made.status_code == 201
    assert (inherited["models"], inherited["routes"], inherited["limits"]["spend_per_month_microusd"]) == (["auto"], ["chat"], 100)
    assert datetime.fromisoformat(inherited["expires_at"]) == ends
    for wider in (
        {"models": ["auto", "big"]},
        {"routes": ["chat", "embeddings"]},
        {"limits": {"spend_per_month_microusd": 101}},
        {"limits": {"spend_per_month_microusd": None}},
        {"expires_at": (ends + timedelta(seconds=1)).isoformat()},
    ):
        assert (await running.call("narrow", "POST", "/tenants/acme/keys", json=wider)).status_code == 403
    assert (await running.call("narrow", "POST", f"/keys/{running.keys['acme'].id}/rotate")).status_code == 403
    assert (await running.call("narrow", "POST", "/tenants/bolt/keys", json={})).status_code == 404
    assert (await running.call("narrow", "POST", "/operators", json={"role": "viewer"})).status_code == 403


async def test_a_suspended_tenant_is_refused_everywhere_and_goes_on_when_resumed(running: Running) -> None:
    assert (await running.call("admin", "POST", "/tenants/acme/suspend")).json()["status"] == "suspended"
    for who, path in (("acme", "/v1/models"), ("acme admin", "/tenants")):
        await until_status(lambda who=who, path=path: running.call(who, "GET", path), 403)  # type: ignore[misc]
        assert (await running.call(who, "GET", path)).json()["error"]["code"] == "tenant_suspended"
    assert (await running.call("admin", "POST", "/tenants/acme/resume")).json()["status"] == "active"
    await until_status(lambda: running.call("acme", "GET", "/v1/models"), 200)


async def test_a_deleted_tenant_leaves_its_bill_and_its_chain_and_nothing_of_its_texts(running: Running) -> None:
    await record(running.pool, interaction(), interaction(cost_microusd=9), interaction(tenant_id="ten_b"))
    await registry.save_domains(running.pool, "ten_a", [{"name": "sums"}])
    deleted = await running.call("admin", "DELETE", "/tenants/acme")
    assert deleted.json() == {"id": "ten_a", "deleted": True, "interactions_erased": 2}
    for who in ("acme", "acme admin"):
        assert await until_status(lambda who=who: running.call(who, "GET", "/v1/models"), 401) < SOON  # type: ignore[misc]
    assert [row["tenant_id"] for row in await running.pool.fetch("select tenant_id from bodies")] == ["ten_b"]
    assert await running.pool.fetchval("select count(*) from domains where tenant_id = 'ten_a'") == 0
    assert (await running.call("admin", "GET", "/tenants/acme")).status_code == 404
    bill = (await running.call("billing", "GET", "/billing", params={"month": "2026-06", "tenant": "ten_a"})).json()["data"]
    assert [(row["cost_microusd"], row["status"]) for row in bill] == [(16, "deleted")]
    verified = (await running.call("viewer", "GET", "/audit/verify")).json()
    assert (verified["whole"], verified["broken"]) == (True, None)
    told = (await running.call("viewer", "GET", "/audit", params={"tenant": "ten_a"})).json()["data"]
    assert [link["action"] for link in told[:2]] == ["erase", "tenant.delete"]
    assert told[1]["actor"] == running.keys["admin"].id
    again = await running.call("admin", "POST", "/tenants", json={"name": "acme"})
    assert (again.status_code, again.json()["tenant_id"] == "ten_a") == (201, False)
    late = interaction()
    await record(running.pool, late)  # a stream that was still running
    await bodies.sweep(running.pool)
    assert await running.pool.fetchval("select count(*) from bodies where tenant_id = 'ten_a'") == 0


async def test_erasing_one_request_leaves_the_others(running: Running) -> None:
    one, other = interaction(), interaction()
    await record(running.pool, one, other)
    erased = await running.call("acme admin", "POST", "/tenants/acme/erase", json={"request_id": one.request_id})
    assert erased.json() == {"interactions_erased": 1}
    assert [row["request_id"] for row in await running.pool.fetch("select request_id from bodies")] == [other.request_id]


# --- the plan ------------------------------------------------------------------------------------------------------


async def test_a_full_store_keeps_no_more_texts_but_answers_and_bills(running: Running) -> None:
    await record(running.pool, interaction(answer="x" * 1_000))
    shown = (await running.call("viewer", "GET", "/tenants/acme")).json()["storage_bytes"]
    assert 1_000 < shown["used"] < 1_200
    await running.call("admin", "PATCH", "/tenants/acme", json={"limits": {"storage_bytes": 1_500}})
    assert (await running.call("acme", "POST", "/v1/chat/completions", json=ASK)).status_code == 200
    assert await running.pool.fetchval("select count(*) from bodies") == 2
    await record(running.pool, interaction(answer="x" * 1_000))
    await until(lambda: running.app.state.callers.authenticate(f"Bearer {running.texts['acme']}").bodies == "off")
    answered = await running.call("acme", "POST", "/v1/chat/completions", json=ASK | {"temperature": 1})
    assert answered.status_code == 200
    assert await running.pool.fetchval("select count(*) from bodies") == 3
    assert await running.pool.fetchval("select count(*) from interactions") == 4
    await running.call("acme admin", "POST", "/tenants/acme/erase")
    await until(lambda: running.app.state.callers.authenticate(f"Bearer {running.texts['acme']}").bodies == "full")
    assert (await running.call("viewer", "GET", "/tenants/acme")).json()["storage_bytes"]["used"] == 0


# --- reports -------------------------------------------------------------------------------------------------------


async def test_usage_adds_up_however_it_is_grouped(running: Running) -> None:
    day = datetime(2026, 6, 1, tzinfo=UTC)
    rows = [
        interaction(
            tenant_id=("ten_a", "ten_b")[n % 2], key_id=f"k{n % 3}", domain=(None, "sums")[n % 2], cost_microusd=n,
            created_at=day + timedelta(hours=8 * n), cache=("miss", "hit-exact")[n % 2],
        )
        for n in range(30)
    ]  # fmt: skip
    await record(running.pool, *rows)
    for by in ("", "tenant", "day", "tenant,key,model,domain,day", "model,tenant"):
        page, seen, offset = 7, [], 0
        while True:
            part = (await running.call("viewer", "GET", "/usage", params={"by": by, "limit": page, "offset": offset})).json()
            seen += part["data"]
            if not part["has_more"]:
                break
            offset += page
        assert sum(row["cost_microusd"] for row in seen) == sum(range(30))
        assert sum(row["requests"] for row in seen) == 30
        assert sum(row["cached"] for row in seen) == 15
    asked = {"tenant": "acme", "key": "k1", "first_day": "2026-06-02", "last_day": "2026-06-04", "by": "day"}
    found = (await running.call("billing", "GET", "/usage", params=asked)).json()["data"]
    wanted = [r for r in rows if r.tenant_id == "ten_a" and r.key_id == "k1" and 2 <= r.created_at.day <= 4 and r.created_at.month == 6]
    assert sum(row["requests"] for row in found) == len(wanted) > 0


async def test_a_csv_has_all_rows_and_no_formula(running: Running) -> None:
    await record(running.pool, *(interaction(domain=f'=HYPERLINK("http://evil/{n}")', key_id=f"k{n}") for n in range(20)))
    response = await running.call("billing", "GET", "/usage", params={"format": "csv", "limit": 5})
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    assert "attachment" in response.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(response.text, newline="")))
    assert len(rows) == 20
    assert all(row["domain"].startswith("'=") and row["cost_microusd"] == "7" for row in rows)


async def test_a_bill_is_of_one_month_and_exact_to_the_micro_dollar(running: Running) -> None:
    month = datetime(2026, 6, 30, 23, 59, 59, tzinfo=UTC)
    await record(
        running.pool,
        interaction(created_at=month, cost_microusd=1_234_567, tokens_estimated=True),
        interaction(created_at=month + timedelta(seconds=1), cost_microusd=5),
        interaction(created_at=datetime(2026, 6, 1, tzinfo=UTC), cost_microusd=1),
    )
    bills = (await running.call("billing", "GET", "/billing", params={"month": "2026-06"})).json()["data"]
    acme, bolt = bills
    assert (acme["name"], acme["requests"], acme["estimated"], acme["cost_usd"]) == ("acme", 2, 1, "1.234568")
    assert (bolt["name"], bolt["requests"], bolt["cost_usd"]) == ("bolt", 0, "0.000000")
    table = await running.call("billing", "GET", "/billing", params={"month": "2026-06", "format": "csv"})
    assert table.text.splitlines()[1].startswith("2026-06,ten_a,acme,pro,active,2")


# --- what runs -----------------------------------------------------------------------------------------------------


async def test_backends_and_configuration_tell_health_and_no_secret(running: Running, teacher: FakeModelServer) -> None:
    backends = await running.call("viewer", "GET", "/backends")
    (big,) = backends.json()["data"]
    assert (big["name"], big["available"], big["replicas"][0]["state"]) == ("big", True, "closed")
    teacher.status = 500
    for n in range(8):
        body = ASK | {"messages": [{"role": "user", "content": str(n)}]}
        assert (await running.call("acme", "POST", "/v1/chat/completions", json=body)).status_code == 503
    (big,) = (await running.call("viewer", "GET", "/backends")).json()["data"]
    assert (big["available"], big["replicas"][0]["state"], big["replicas"][0]["last_error"]) == (False, "open", "HTTP 500")
    await asyncio.sleep(0.2)
    assert 'tutelage_model_breaker_open{model="big"} 1.0' in (await running.http.get("/metrics")).text
    config = await running.call("viewer", "GET", "/config")
    assert config.json()["version"] == running.app.state.configuration.current.version
    assert config.json()["fault"] is None
    for told in (backends, config):
        assert "hidden" not in told.text
        assert running.home.secret("pepper") not in told.text


async def test_a_fault_is_told_without_what_stands_there() -> None:
    fault = "models.yaml: models.0.api_key: Extra inputs are not permitted (got 'sk-secret'); models.0.x: wrong (got 'other secret')"
    assert without_values(fault) == "models.yaml: models.0.api_key: Extra inputs are not permitted (the gateway's log has the rest)"


async def test_when_the_database_is_gone_administration_is_503_and_never_401(running: Running) -> None:
    await running.app.state.admin_pool.close()
    for who, method, path in (("admin", "GET", "/tenants"), ("viewer", "GET", "/usage"), ("acme admin", "POST", "/tenants/acme/keys")):
        response = await running.call(who, method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
        assert "retry-after" in response.headers
    assert (await running.call("acme", "GET", "/tenants")).status_code == 403
    assert (await running.call(None, "GET", "/tenants")).status_code == 401


# --- audit ---------------------------------------------------------------------------------------------------------


async def test_every_change_is_told_with_who_made_it_and_the_chain_holds(running: Running) -> None:
    actor = running.keys["admin"].id
    made = (await running.call("admin", "POST", "/tenants", json={"name": "newco"})).json()
    path, tenant_id = "/tenants/newco", made["tenant_id"]
    key = (await running.call("admin", "POST", f"{path}/keys", json={"models": ["auto"]})).json()
    rotated = (await running.call("admin", "POST", f"/keys/{key['id']}/rotate")).json()
    await running.call("admin", "POST", f"/keys/{rotated['new']['id']}/revoke")
    await running.call("admin", "PATCH", path, json={"tier": "pro"})
    await running.call("admin", "POST", f"{path}/suspend")
    await running.call("admin", "POST", f"{path}/resume")
    await running.call("admin", "POST", f"{path}/erase", json={})
    await running.call("admin", "DELETE", path)
    told = (await running.call("viewer", "GET", "/audit", params={"tenant": tenant_id})).json()["data"]
    wanted = [
        "tenant.create", "key.create", "key.create", "key.rotate", "key.revoke", "tenant.change", "tenant.change", "tenant.change",
        "erase", "tenant.delete", "erase",
    ]  # fmt: skip
    assert [link["action"] for link in reversed(told)] == wanted
    assert {link["actor"] for link in told} == {actor}
    assert key["key"] not in str(told)
    assert key["key"].split("_")[3] not in str(told)
    operator = (await running.call("admin", "POST", "/operators", json={"role": "viewer"})).json()
    newest = (await running.call("viewer", "GET", "/audit")).json()["data"][0]
    assert (newest["action"], newest["subject"], newest["actor"]) == ("key.create", operator["id"], actor)
    assert (await running.call("viewer", "GET", "/audit/verify")).json()["whole"]


async def test_what_was_refused_is_not_told_as_done(running: Running) -> None:
    before = await audit.count_links(running.pool)
    for who, method, path, body in (
        ("viewer", "POST", "/tenants", {"name": "x"}), ("admin", "POST", "/tenants", {"name": "acme"}),
        ("bolt admin", "POST", "/tenants/acme/keys", {}), ("admin", "POST", "/tenants/acme/keys", {"routes": ["x"]}),
    ):  # fmt: skip
        assert (await running.call(who, method, path, json=body)).status_code >= 400
    assert await audit.count_links(running.pool) == before


async def test_a_tampered_chain_is_found_and_heads_are_exported_while_serving(running: Running) -> None:
    await record(running.pool, interaction(), interaction())
    heads: list[dict[str, Any]] = []
    for _ in range(100):
        heads = (await running.call("viewer", "GET", "/audit/heads")).json()["data"]
        if any(head["tenant_id"] == "ten_a" and head["sequence"] == 7 for head in heads):
            break
        await asyncio.sleep(0.05)
    assert {head["tenant_id"] for head in heads} == {"", "ten_a", "ten_b"}
    async with running.pool.acquire() as connection, connection.transaction():
        await connection.execute("set local session_replication_role = replica")
        await connection.execute("update audit set detail = replace(detail, ':7', ':1') where tenant_id = 'ten_a' and sequence = 6")
    found = (await running.call("viewer", "GET", "/audit/verify")).json()
    assert (found["whole"], found["broken"]["tenant_id"], found["broken"]["sequence"]) == (False, "ten_a", 6)
    assert (await running.call("bolt viewer", "GET", "/audit/verify")).json()["whole"]


async def test_a_chain_is_read_in_pages(running: Running) -> None:
    await record(running.pool, *(interaction() for _ in range(12)))
    seen, before = [], None
    while True:
        params: dict[str, Any] = {"tenant": "acme", "limit": 5} | ({"before": before} if before else {})
        page = (await running.call("viewer", "GET", "/audit", params=params)).json()
        seen += [link["sequence"] for link in page["data"]]
        if not page["has_more"]:
            break
        before = seen[-1]
    assert seen == list(range(len(seen), 0, -1))


# --- policies ----------------------------------------------------------------------------------------------------


async def test_policies_are_listed_with_their_reasons_and_an_older_one_is_taken_up_again(running: Running) -> None:
    assert (await running.call("acme viewer", "GET", "/tenants/acme/policies")).json()["data"] == []
    for version, threshold in ((1, 0.9), (2, 0.8)):
        settings, evidence = {"threshold": threshold}, {"threshold": {"requests": 500}}
        told = {"reason": f"to {threshold}", "evidence": evidence, "actor": "test"}
        await policies.append(running.pool, "ten_a", settings, expected=version - 1, **told)
    back = await running.call("acme admin", "POST", "/tenants/acme/policies/revert", json={"version": 1, "reason": "complaints"})
    assert (back.status_code, back.json()["version"], back.json()["settings"]["threshold"]) == (200, 3, 0.9)
    listed = (await running.call("acme viewer", "GET", "/tenants/acme/policies")).json()["data"]
    assert [(row["version"], row["reason"], row["reverts_to"]) for row in listed] == [
        (3, "complaints", 1), (2, "to 0.8", None), (1, "to 0.9", None),
    ]  # fmt: skip
    assert listed[1]["evidence"]["threshold"]["requests"] == 500
    link = (await running.call("admin", "GET", "/audit?tenant=acme&limit=1")).json()["data"][0]
    assert (link["action"], link["detail"]["reverts_to"]) == ("policy.change", 1)


async def test_a_version_that_never_was_is_404_and_a_policy_that_moved_is_409(running: Running) -> None:
    unknown = await running.call("admin", "POST", "/tenants/acme/policies/revert", json={"version": 7, "reason": "x"})
    assert unknown.status_code == 404
    moved = await running.call("admin", "POST", "/tenants/acme/policies/revert", json={"version": 0, "reason": "x", "expected": 4})
    assert (moved.status_code, moved.json()["error"]["code"]) == (409, "conflict")


async def test_a_strategy_is_chosen_within_the_plan(running: Running) -> None:
    chosen = await running.call("acme admin", "PATCH", "/tenants/acme", json={"strategy": "budget", "max_cost_microusd": 500})
    assert (chosen.json()["strategy"], chosen.json()["max_cost_microusd"]) == ("budget", 500)
    lifted = await running.call("acme admin", "PATCH", "/tenants/acme", json={"max_cost_microusd": None, "min_confidence": 0.9})
    assert [lifted.json()[name] for name in ("strategy", "max_cost_microusd", "min_confidence")] == ["budget", None, 0.9]
    await running.call("admin", "PATCH", "/tenants/bolt", json={"tier": "free"})
    refused = await running.call("bolt admin", "PATCH", "/tenants/bolt", json={"strategy": "parallel"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "strategy")


async def test_rows_of_policies_are_never_changed(running: Running) -> None:
    await policies.append(running.pool, "ten_a", {}, reason="x", evidence={}, actor="test", expected=0)
    for statement in ("update policies set reason = 'y'", "delete from policies"):
        with pytest.raises(asyncpg.PostgresError, match="append-only"):
            await running.pool.execute(statement)
