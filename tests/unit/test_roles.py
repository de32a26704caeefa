"""Who may do what, and that no key makes one that opens more than itself."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import Conflict, Forbidden, InvalidRequest, NotFound
from tutelage.gateway import tenancy
from tutelage.gateway.limits import Limits
from tutelage.gateway.roles import ACTIONS, ALLOWED, OWN, ROLES, ROUTES, may, within
from tutelage.gateway.tenancy import Maker, Scope
from tutelage.records import Key

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def key(tenant_id: str | None = None, role: str | None = "admin", **changes: Any) -> Key:
    return Key(**({"id": "k", "tenant_id": tenant_id, "role": role, "hash": b"", "expires_at": None, "revoked_at": None} | changes))


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("role", ROLES)
def test_an_operator_may_do_what_its_role_says_to_every_tenant(role: str, action: Any) -> None:
    for of in (None, "ten_a", "ten_b"):
        verdict = may(key(role=role), action, of=of)
        assert (verdict.allowed, verdict.hidden) == (action in ALLOWED[role], False)
        assert verdict.allowed or role in verdict.reason


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("role", ROLES)
def test_a_tenants_key_may_do_less_than_an_operator_of_its_role_and_to_its_own_tenant_alone(role: str, action: Any) -> None:
    own, other = (may(key("ten_a", role), action, of=of) for of in ("ten_a", "ten_b"))
    assert own.allowed == (action in ALLOWED[role] & OWN)
    assert not other.allowed
    assert other.hidden == own.allowed, "what it could do at home looks elsewhere as if nobody were there"


@pytest.mark.parametrize("action", ACTIONS)
def test_a_key_without_a_role_may_do_nothing(action: Any) -> None:
    assert not may(key("ten_a", None), action, of="ten_a").allowed
    assert not may(key("ten_a", "root"), action, of="ten_a").allowed


def test_only_admins_make_and_change_anything() -> None:
    reads = {action for action in ACTIONS if action.endswith(".read")}
    assert ALLOWED["viewer"] | ALLOWED["billing"] <= reads
    assert ALLOWED["admin"] == set(ACTIONS)


names = st.sampled_from(["auto", "big", "small", "teacher"])
scopes = st.builds(
    Scope,
    role=st.none() | st.sampled_from(ROLES),
    models=st.none() | st.lists(names, max_size=3),
    routes=st.none() | st.lists(st.sampled_from(ROUTES), max_size=3),
    limits=st.dictionaries(st.sampled_from(sorted(Limits.model_fields)), st.none() | st.integers(1, 5), max_size=3),
    expires_at=st.none() | st.integers(1, 5).map(lambda days: NOW + timedelta(days=days)),
)


def makers(tenant: str | None) -> st.SearchStrategy[Key]:
    made = st.builds(lambda s: key(tenant, s.role, models=s.models, routes=s.routes, limits=s.limits, expires_at=s.expires_at), scopes)
    return made if tenant else made.map(lambda k: replace(k, models=None, routes=None, limits={}))


def opens(a: Key, b: Key) -> bool:
    """Whether all that `a` opens, `b` opens too: stated by what a request could do, not by how the rule is written."""
    tenants_ok = b.tenant_id is None or a.tenant_id == b.tenant_id
    actions = all(
        not may(a, action, of=of).allowed or may(b, action, of=of).allowed for action in ACTIONS for of in (None, "ten_a", "ten_b")
    )
    models = all(
        (b.models is None or m in b.models) for m in ["auto", "big", "small", "teacher", "other"] if a.models is None or m in a.models
    )
    routes = all((b.routes is None or r in b.routes) for r in ROUTES if a.routes is None or r in a.routes)
    times = [NOW + timedelta(hours=6 * n) for n in range(40)]
    lives = all(b.expires_at is None or t < b.expires_at for t in times if a.expires_at is None or t < a.expires_at)
    limits = all(b.limits.get(n) is None or (a.limits.get(n) is not None and a.limits[n] <= b.limits[n]) for n in Limits.model_fields)
    return tenants_ok and actions and models and routes and lives and limits


@given(maker=makers("ten_a") | makers(None), scope=scopes, tenant=st.sampled_from(["ten_a", "ten_b"]))
def test_whatever_is_asked_for_a_key_made_opens_nothing_that_its_maker_does_not(maker: Key, scope: Scope, tenant: str) -> None:
    try:
        made = tenancy._mint("pepper", tenant, scope, maker=Maker(maker.id, maker), now=NOW).key
    except (Forbidden, NotFound):
        return
    assert opens(made, maker)
    assert may(made, "keys.create", of=tenant).allowed <= may(maker, "keys.create", of=tenant).allowed


@given(maker=makers("ten_a"), tenant=st.just("ten_a"))
def test_a_key_that_asks_for_nothing_gets_as_much_as_its_maker_but_no_role(maker: Key, tenant: str) -> None:
    made = tenancy._mint("pepper", tenant, Scope(), maker=Maker(maker.id, maker), now=NOW).key
    assert within(made, maker).allowed
    assert (made.models, made.routes, made.expires_at, made.role) == (maker.models, maker.routes, maker.expires_at, None)


@given(made=makers("ten_a"), maker=makers("ten_a"))
def test_the_rule_agrees_with_what_requests_could_do(made: Key, maker: Key) -> None:
    verdict = within(made, maker)
    if verdict.allowed:
        assert opens(made, maker)
    elif opens(made, maker):
        # stricter only where a list names what does not exist or a role does nothing more at this tenant
        assert "role" in verdict.reason or "models" in verdict.reason


def test_what_cannot_be_asked_for_is_refused_with_what_can() -> None:
    for scope, match in (
        (Scope(routes=["admin"]), "chat, embeddings"),
        (Scope(role="root"), "admin, billing, viewer"),
        (Scope(limits={"queries": 5}), "queries_per_day"),
        (Scope(expires_at=NOW), "past"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            tenancy._mint("pepper", "ten_a", scope, maker=Maker("cli:me"), now=NOW)
    with pytest.raises(InvalidRequest, match="operator"):
        tenancy._mint("pepper", None, Scope(role="admin", models=["auto"]), maker=Maker("cli:me"), now=NOW)


def test_operators_keys_are_known_by_sight() -> None:
    assert tenancy._mint("pepper", None, Scope(role="viewer"), maker=Maker("cli:me"), now=NOW).text.startswith("tut_admin_")
    assert tenancy._mint("pepper", "ten_a", Scope(), maker=Maker("cli:me"), now=NOW).text.startswith("tut_live_")


async def test_a_key_that_opens_nothing_is_not_rotated() -> None:
    for ended in (key("ten_a", revoked_at=NOW), key("ten_a", expires_at=NOW)):
        with pytest.raises(Conflict):
            await tenancy.rotate_key(None, "pepper", ended, overlap=timedelta(0), maker=Maker("cli:me"), now=NOW)  # type: ignore[arg-type]


async def test_a_narrow_admin_is_not_handed_a_wider_key_by_rotating_it() -> None:
    narrow = key("ten_a", models=["auto"])
    with pytest.raises(Forbidden, match="models any"):
        await tenancy.rotate_key(
            None,
            "pepper",
            key("ten_a", None, id="other"),
            overlap=timedelta(0),
            maker=Maker("k", narrow),
            now=NOW,  # type: ignore[arg-type]
        )
