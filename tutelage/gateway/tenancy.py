"""What may be done to tenants and their keys: one function a verb, for the admin API and the command line alike.

Each is bound by the key that asks for it (`roles.within`) and told in the audit chain with its actor. It refuses to know HTTP and
arguments.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from tutelage.errors import Conflict, Forbidden, InvalidRequest, NotFound
from tutelage.gateway import keys, limits, roles
from tutelage.gateway.limits import Agreement
from tutelage.records import Key, Tenant
from tutelage.stores import bodies, policies, tenants
from tutelage.stores.database import Pool

NAME = r"[\w .-]{1,64}"


@dataclass(frozen=True)
class Maker:
    """Who acts: the actor's name in the audit chain, and the key that binds what it makes (None: whoever owns the machine)."""

    actor: str
    key: Key | None = None


@dataclass(frozen=True)
class Scope:
    """What a new key is asked to open. What is None is taken from the key that makes it: as much as that may."""

    role: str | None = None
    models: Sequence[str] | None = None
    routes: Sequence[str] | None = None
    limits: Mapping[str, Any] | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True)
class Made:
    """A new key and its text, which is shown once and kept nowhere."""

    key: Key
    text: str


async def create_tenant(pool: Pool, pepper: str, tenant: Tenant, *, maker: Maker, now: datetime) -> tuple[Tenant, Made]:
    """A new tenant and its first key, both or neither. Raises InvalidRequest, Conflict (the name is taken)."""
    if not re.fullmatch(NAME, tenant.name):
        raise InvalidRequest(
            f"tenant name {tenant.name!r}: 1 to 64 letters, digits, spaces, dots, dashes or underscores are allowed", param="name"
        )
    limits.check_strategy(tenant.strategy, limits.strategies(tenant.tier), param="strategy")
    created = replace(tenant, id=f"ten_{uuid.uuid4().hex[:16]}", limits=limits.check(tenant.limits, Agreement))
    made = _mint(pepper, created.id, Scope(), maker=maker, now=now)
    await tenants.create_tenant(pool, created, key=made.key, actor=maker.actor)
    return created, made


async def change_tenant(pool: Pool, tenant: Tenant, changes: Mapping[str, Any], *, maker: Maker) -> Tenant:
    """What of it may change (`records.Tenant`); limits stand beside those agreed before.

    Raises InvalidRequest, or Forbidden for a strategy that its plan does not allow.
    """
    changed = dict(changes)
    if "strategy" in changed:
        allowed = limits.strategies(changed.get("tier", tenant.tier))
        limits.check_strategy(changed["strategy"], allowed, param="strategy")
    if "limits" in changed:
        changed["limits"] = {**tenant.limits, **limits.check(changed["limits"], Agreement)}
    return await tenants.change(pool, tenant.id, changed, actor=maker.actor) if changed else tenant


async def delete_tenant(pool: Pool, tenant: Tenant, *, maker: Maker, now: datetime) -> int:
    """Its keys end first, then all it asked and was answered is erased; of how many interactions. The ledger and the chain stay."""
    await tenants.delete_tenant(pool, tenant.id, at=now, actor=maker.actor)
    return await bodies.erase(pool, tenant.id, actor=maker.actor)


async def revert_policy(
    pool: Pool, tenant: Tenant, version: int, *, reason: str, maker: Maker, expected: int | None = None
) -> dict[str, Any]:
    """A new version of its routing policy that says what an old one said; 0: what is configured. `expected`: the version that is believed
    to hold; None: whichever does.

    Raises:
        NotFound: it never had this version.
        Conflict: another version holds.
    """
    settings = (await policies.find(pool, tenant.id, version))["settings"] if version else {}
    held = max((row["version"] for row in await policies.history(pool, tenant.id)), default=0)
    return await policies.append(
        pool,
        tenant.id,
        settings,
        reason=reason,
        evidence={},
        actor=maker.actor,
        expected=held if expected is None else expected,
        reverts_to=version,
    )


async def create_key(pool: Pool, pepper: str, tenant_id: str | None, scope: Scope, *, maker: Maker, now: datetime) -> Made:
    """A tenant's new key, or without a tenant an operator's.

    Raises:
        InvalidRequest: no such scope.
        Forbidden: it would open what its maker does not.
        NotFound: its tenant is gone.
    """
    made = _mint(pepper, tenant_id, scope, maker=maker, now=now)
    await tenants.add_key(pool, made.key, actor=maker.actor)
    return made


async def rotate_key(pool: Pool, pepper: str, old: Key, *, overlap: timedelta, maker: Maker, now: datetime) -> tuple[Made, Key]:
    """A new key beside the old one, which ends after the overlap: the same role, models, routes, limits and end; and the old one.

    Raises:
        Conflict: the old one opens nothing any more.
        Forbidden: whoever asks would be handed more than it has.
    """
    if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now):
        raise Conflict(f"key {old.id} was revoked or has expired; make a new one: tutelage keys create TENANT")
    made = _minted(pepper, old)
    _bound(made.key, maker)
    return made, await tenants.replace_key(pool, old.id, made.key, ends=now + overlap, actor=maker.actor)


async def revoke_key(pool: Pool, key_id: str, *, maker: Maker, now: datetime) -> Key:
    """It opens nothing any more, everywhere within the age of a snapshot. Raises NotFound."""
    return await tenants.end_key(pool, key_id, at=now, revoke=True, actor=maker.actor)


def _mint(pepper: str, tenant_id: str | None, scope: Scope, *, maker: Maker, now: datetime) -> Made:
    unknown = sorted(set(scope.routes or ()) - set(roles.ROUTES))
    if unknown:
        raise InvalidRequest(f"routes: {', '.join(unknown)} unknown; allowed: {', '.join(roles.ROUTES)}", param="routes")
    if scope.role is not None and scope.role not in roles.ROLES:
        raise InvalidRequest(f"role {scope.role!r} is unknown; allowed: {', '.join(roles.ROLES)}", param="role")
    if scope.expires_at is not None and scope.expires_at <= now:
        raise InvalidRequest(f"expires_at {scope.expires_at.isoformat()} is in the past", param="expires_at")
    if tenant_id is None and (scope.models is not None or scope.routes is not None or scope.limits):
        raise InvalidRequest("an operator's key has a role and an end; models, routes and limits are for tenants' keys")
    asked = Key("", tenant_id, scope.role, b"", scope.expires_at, None, scope.models, limits.check(scope.limits or {}), scope.routes)
    made = _minted(pepper, asked if maker.key is None else _inherited(asked, maker.key))
    _bound(made.key, maker)
    return made


def _minted(pepper: str, key: Key) -> Made:
    minted = keys.mint(pepper, environment="admin" if key.tenant_id is None else "live")
    return Made(replace(key, id=minted.id, hash=minted.hash, revoked_at=None), minted.text)


def _inherited(asked: Key, maker: Key) -> Key:
    """What was not asked for is as much as its maker has."""
    own = {name: bound for name, bound in maker.limits.items() if bound is not None}
    return replace(
        asked,
        models=maker.models if asked.models is None else asked.models,
        routes=maker.routes if asked.routes is None else asked.routes,
        expires_at=maker.expires_at if asked.expires_at is None else asked.expires_at,
        limits={**own, **asked.limits},
    )


def _bound(made: Key, maker: Maker) -> None:
    if maker.key is None:
        return
    verdict = roles.within(made, maker.key)
    if verdict.hidden:
        raise NotFound(f"no tenant {made.tenant_id!r}")
    if not verdict.allowed:
        raise Forbidden(verdict.reason)
