"""The one way in to /admin/v1: who asks (from the snapshot), whether it may (`roles.py`), what it is about, and what went wrong.

Every route is declared with the action it takes, so that none is open by mistake. It refuses to know what an action does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import asyncpg
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError

from tutelage import sheets
from tutelage.errors import Forbidden, InvalidRequest, NotFound, Unavailable
from tutelage.gateway import openai, roles, wire
from tutelage.gateway.admin.shapes import Nothing
from tutelage.gateway.described import schema_of
from tutelage.gateway.roles import Action, Role
from tutelage.gateway.tenancy import NAME, Maker
from tutelage.records import Key, Tenant
from tutelage.stores import tenants
from tutelage.stores.database import Pool

PREFIX = "/admin/v1"
KEY_ID = re.compile(r"[0-9a-f]{12}")
OUTAGE = (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.QueryCanceledError,
          asyncpg.OperatorInterventionError, asyncpg.InsufficientResourcesError)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One request that was let in. `tenant` and `key` are what its path names."""

    by: Key
    pool: Pool
    state: Any
    pepper: str
    tenant: Tenant | None = None
    key: Key | None = None
    body: Any = None
    query: Any = None

    @property
    def maker(self) -> Maker:
        return Maker(self.by.id, self.by)

    def require(self, action: Action, *, of: str | None) -> None:
        """Raises Forbidden, or NotFound where what it is about is another tenant's."""
        verdict = roles.may(self.by, action, of=of)
        if verdict.hidden:
            raise NotFound(f"no tenant {of!r}")
        if not verdict.allowed:
            raise Forbidden(verdict.reason)

    async def tenant_asked_for(self, action: Action, named: str | None) -> str | None:
        """The id of the tenant that a query names, a deleted one by its id too, or else of the tenant that asks; None: an operator who
        named none. Raises NotFound."""
        if named is None:
            return self.by.tenant_id
        return (await self.tenant_named(action, named, deleted=True)).id

    async def tenant_named(self, action: Action, named: str, *, deleted: bool = False) -> Tenant:
        """By its id or name, if the action may be taken on it. Raises NotFound, which tells no more of another tenant than of none."""
        try:
            found = await _find_tenant(self.pool, named, deleted=deleted)
            self.require(action, of=found.id)
        except NotFound:
            raise NotFound(f"no tenant {named!r}") from None
        return found


Handler = Callable[[Call], Awaitable[BaseModel | Response]]


@dataclass(frozen=True)
class Route:
    """One route. `body` and `query` are what may be sent, `answer` what comes back with `status`."""

    method: str
    path: str
    action: Action
    handler: Handler
    answer: type[BaseModel]
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    status: int = 200
    csv: bool = False
    faults: tuple[int, ...] = field(default=())


def add_route(app: wire.Gateway, route: Route) -> None:
    app.add_api_route(
        PREFIX + route.path,
        partial(_answer, route),
        methods=[route.method],
        status_code=route.status,
        summary=(route.handler.__doc__ or "").strip().split("\n")[0],
        name=route.handler.__name__,
        operation_id=f"{route.method.lower()}{re.sub(r'[^a-z_]+', '_', route.path)}",
        tags=["admin"],
        responses=_responses(route),
        openapi_extra=_told(route),
    )


async def _answer(route: Route, request: Request) -> Response:
    state = request.app.state
    try:
        key = state.callers.administrator(request.headers.get("authorization"))
        call = Call(key, state.admin_pool, state, state.pepper)
        call.require(route.action, of=key.tenant_id)  # whoever may not do this at all learns nothing of what is there
        call = await _about(call, request, route)
        answered = await route.handler(call)
    except OUTAGE as broken:
        raise Unavailable("the database cannot be reached; nothing was changed that was not answered: look and try again") from broken
    if isinstance(answered, Response):
        return answered
    return Response(answered.model_dump_json(), status_code=route.status, media_type=openai.JSON)


async def _about(call: Call, request: Request, route: Route) -> Call:
    """With what its path names and what was sent. Raises NotFound, InvalidRequest."""
    tenant = key = None
    if "tenant" in request.path_params:
        tenant = await call.tenant_named(route.action, request.path_params["tenant"])
    if "key_id" in request.path_params:
        key = await _find_key(call, route.action, request.path_params["key_id"])
    body = await _body(request, route.body) if route.body else None
    query = _query(request, route.query or Nothing)
    return Call(call.by, call.pool, call.state, call.pepper, tenant, key, body, query)


async def _find_tenant(pool: Pool, named: str, *, deleted: bool) -> Tenant:
    """Raises NotFound."""
    if re.fullmatch(NAME, named):
        for tenant in await tenants.list_tenants(pool, deleted=deleted):
            if named == tenant.id or (named == tenant.name and tenant.status != "deleted"):
                return tenant
    raise NotFound(f"no tenant {named!r}")


async def _find_key(call: Call, action: Action, key_id: str) -> Key:
    if not KEY_ID.fullmatch(key_id):
        raise NotFound(f"no key {key_id!r}")
    try:
        found = await tenants.find_key(call.pool, key_id)
        call.require(action, of=found.tenant_id)
    except NotFound:
        raise NotFound(f"no key {key_id!r}") from None
    return found


async def _body(request: Request, kind: type[BaseModel]) -> Any:
    settings = request.app.state.configuration.current.gateway
    received = await wire.read_body(request, most_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    optional = not any(field.is_required() for field in kind.model_fields.values())
    return openai.parse_body(kind, received or b"{}" if optional else received)


def _query(request: Request, kind: type[BaseModel]) -> Any:
    """Raises InvalidRequest for an unknown, doubled or wrong parameter."""
    sent = request.query_params.multi_items()
    doubled = sorted(name for name, times in Counter(name for name, _ in sent).items() if times > 1)
    unknown = sorted({name for name, _ in sent} - set(kind.model_fields))
    if unknown or doubled:
        wrong = (unknown or doubled)[0]
        told = f"allowed: {', '.join(kind.model_fields) or 'none'}" if unknown else "given twice"
        raise InvalidRequest(f"query parameter {wrong[:80]!r}: {told}", param=wrong[:80])
    try:
        return kind.model_validate(dict(sent))
    except ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"query parameter {where}: {first['msg']} (got {str(first['input'])[:80]!r})", param=where) from invalid


def as_csv(columns: tuple[str, ...], rows: AsyncIterator[Mapping[str, Any]], *, name: str) -> Response:
    """Rows as a CSV file, as they come; when they break off, so does the reply, and no half of a file looks like a whole one."""

    async def lines() -> AsyncIterator[str]:
        yield sheets.header(columns)
        async for row in rows:
            yield sheets.line([row[column] for column in columns])

    headers = {"content-disposition": f'attachment; filename="{name}.csv"', "x-content-type-options": "nosniff"}
    return StreamingResponse(lines(), media_type="text/csv; charset=utf-8", headers=headers)


# --- what /openapi.json tells -------------------------------------------------------------------------------------

FAULTS = {
    400: "The request cannot be understood",
    401: "No key, or none that opens anything",
    403: "The key's role may not do this, or its tenant is suspended",
    404: "Nothing has this name, or it is another tenant's",
    405: "The path names something else, which is not asked so",
    408: "The body did not arrive in time",
    409: "What is there already stands against it",
    413: "The body is too large",
    503: "The database cannot be reached; retry-after says when to come back",
}


def _responses(route: Route) -> dict[int | str, dict[str, Any]]:
    faults = (
        {400, 401, 403, 503, *route.faults}
        | ({404, 405} if "{" in route.path else {404} if route.query else set())
        | ({408, 413} if route.body else set())
    )
    good: dict[str, Any] = {"model": route.answer}
    if route.csv:
        good["content"] = {"text/csv": {"schema": {"type": "string"}}}
    return {route.status: good, **{status: {"model": openai.Error, "description": FAULTS[status]} for status in sorted(faults)}}


def _told(route: Route) -> dict[str, Any]:
    """`x-tutelage-action` and `x-tutelage-roles`: what the route takes, and who may; a tenant's key only where `x-tutelage-own`."""
    able = [role for role in roles.ROLES if route.action in roles.ALLOWED[role]]
    told: dict[str, Any] = {
        "security": [{"BearerKey": []}],
        "description": f"{(route.handler.__doc__ or '').strip()}\n\nTakes `{route.action}`: {_who(able, own=route.action in roles.OWN)}.",
        "x-tutelage-action": route.action,
        "x-tutelage-roles": able,
        "x-tutelage-own": route.action in roles.OWN,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": PATH[name]} for name in re.findall(r"{(\w+)}", route.path)
        ] + _parameters(route.query),
    }  # fmt: skip
    if route.body:
        required = any(field.is_required() for field in route.body.model_fields.values())
        told["requestBody"] = {"required": required, "content": {"application/json": {"schema": schema_of(route.body)}}}
    return told


PATH: dict[str, dict[str, Any]] = {
    "tenant": {"type": "string", "minLength": 1, "maxLength": 64, "description": "Its id or its name"},
    "key_id": {"type": "string", "pattern": f"^{KEY_ID.pattern}$"},
}


def _who(able: list[Role], *, own: bool) -> str:
    return f"operators with role {', '.join(able)}{' and keys of the tenant itself with that role' if own else ''}"


def _parameters(kind: type[BaseModel] | None) -> list[dict[str, Any]]:
    if kind is None:
        return []
    told = schema_of(kind)["properties"]
    return [{"name": name, "in": "query", "required": False, "schema": _plain(schema)} for name, schema in told.items()]


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Nothing in a query is null: a parameter that may be left out has the schema of its value."""
    some = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "title") and value is not None}
    return {**rest, **some[0]} if len(some) == 1 else rest
