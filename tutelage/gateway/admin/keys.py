"""/admin/v1/keys and /admin/v1/operators: make, list, rotate and revoke. No key ever opens more than the one that made it.

It refuses to know how a key is made (`gateway/tenancy.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Literal

from tutelage import records
from tutelage.gateway import tenancy
from tutelage.gateway.admin import shapes
from tutelage.gateway.admin.door import Call, Route
from tutelage.gateway.limits import Limits
from tutelage.gateway.tenancy import Made, Scope
from tutelage.stores import tenants


async def create(call: Call) -> shapes.MadeKey:
    """Make a key of the tenant, which is shown this once."""
    assert call.tenant is not None
    asked: shapes.NewKey = call.body
    own = asked.limits.model_dump(exclude_unset=True)
    scope = Scope(asked.role, asked.models, asked.routes, own, asked.expires_at)
    now = datetime.now(UTC)
    return _made(await tenancy.create_key(call.pool, call.pepper, call.tenant.id, scope, maker=call.maker, now=now), now)


async def listing(call: Call) -> shapes.Keys:
    """The tenant's keys, never their secrets."""
    assert call.tenant is not None
    return await _page(call, call.tenant.id)


async def create_operator(call: Call) -> shapes.MadeKey:
    """Make an operator's key, which is shown this once."""
    asked: shapes.NewOperator = call.body
    scope, now = Scope(asked.role, expires_at=asked.expires_at), datetime.now(UTC)
    return _made(await tenancy.create_key(call.pool, call.pepper, None, scope, maker=call.maker, now=now), now)


async def list_operators(call: Call) -> shapes.Keys:
    """The operators' keys, never their secrets."""
    return await _page(call, None)


async def rotate(call: Call) -> shapes.RotatedKey:
    """Make a key that opens the same, and let the old one end after the overlap."""
    assert call.key is not None
    asked: shapes.Rotation = call.body
    now, overlap = datetime.now(UTC), timedelta(seconds=asked.overlap_seconds)
    made, old = await tenancy.rotate_key(call.pool, call.pepper, call.key, overlap=overlap, maker=call.maker, now=now)
    return shapes.RotatedKey(new=_made(made, now), old=_shown(old, now))


async def revoke(call: Call) -> shapes.Key:
    """End a key now: no worker takes it once its snapshot is new, within half a second unless configured otherwise."""
    assert call.key is not None
    now = datetime.now(UTC)
    return _shown(await tenancy.revoke_key(call.pool, call.key.id, maker=call.maker, now=now), now)


async def _page(call: Call, tenant_id: str | None) -> shapes.Keys:
    page: shapes.Page = call.query
    seen = [key for key in await tenants.list_keys(call.pool) if key.tenant_id == tenant_id]
    ids = [key.id for key in seen]
    start = ids.index(page.after) + 1 if page.after in ids else 0 if page.after is None else len(ids)
    now = datetime.now(UTC)
    return shapes.Keys(data=[_shown(key, now) for key in seen[start : start + page.limit]], has_more=len(seen) > start + page.limit)


def _shown(key: records.Key, now: datetime) -> shapes.Key:
    return shapes.Key(
        id=key.id,
        tenant_id=key.tenant_id,
        role=key.role,  # type: ignore[arg-type]
        models=None if key.models is None else list(key.models),
        routes=None if key.routes is None else list(key.routes),
        limits=Limits.model_validate(dict(key.limits)),
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
        status=_status(key, now),
    )


def _status(key: records.Key, now: datetime) -> Literal["live", "expired", "revoked"]:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= now else "live"


def _made(made: Made, now: datetime) -> shapes.MadeKey:
    return shapes.MadeKey(**_shown(made.key, now).model_dump(), key=made.text)


ROUTES = (
    Route("POST", "/tenants/{tenant}/keys", "keys.create", create, shapes.MadeKey, body=shapes.NewKey, status=201),
    Route("GET", "/tenants/{tenant}/keys", "keys.read", listing, shapes.Keys, query=shapes.Page),
    Route("POST", "/operators", "operators.create", create_operator, shapes.MadeKey, body=shapes.NewOperator, status=201),
    Route("GET", "/operators", "operators.read", list_operators, shapes.Keys, query=shapes.Page),
    Route("POST", "/keys/{key_id}/rotate", "keys.rotate", rotate, shapes.RotatedKey, body=shapes.Rotation, faults=(409,)),
    Route("POST", "/keys/{key_id}/revoke", "keys.revoke", revoke, shapes.Key, body=shapes.Nothing),
)
