"""The Python API: an installation, its tenants and its gateway from inside a program. A thin facade over what `tutelage serve` runs: a
request goes the whole way that one over HTTP goes. It refuses to hold any rule.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, TypeVar

import httpx
import orjson

from tutelage import errors
from tutelage.errors import InvalidRequest, NotFound
from tutelage.fleet import engines, processes
from tutelage.fleet.local import prepare_encoder
from tutelage.gateway import app, tenancy, wire
from tutelage.gateway.tenancy import Maker, Scope
from tutelage.records import Tenant
from tutelage.settings import Home, TierSettings, load
from tutelage.stores import tenants
from tutelage.stores.database import Pool, open_pool

Result = TypeVar("Result")
MAKER = Maker("python")
KEY_HOURS = 24  # how long a key lives that a program makes for itself
HEADERS = {"priority": "x-tutelage-priority", "cache": "x-tutelage-cache"}


@dataclass(frozen=True)
class Request:
    """One question of a tenant. `request_id` is its idempotency key: sent again within a day it gets the same answer and one bill line.
    `metadata` holds `priority`, `cache`, and any field of an OpenAI chat request (`model`, `max_tokens`, `messages`)."""

    request_id: str
    tenant_id: str
    query: str
    domain: str | None = None
    timestamp: float = field(default_factory=time.time)  # of the caller; what is billed has the gateway's own
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    """What was answered, by whom and why. `completion` is the whole OpenAI chat completion; `interaction_id` is what feedback names."""

    request_id: str
    interaction_id: str
    answer: str
    model: str
    tier: str
    route: str
    domain: str | None
    confidence: float | None
    cache: str
    cost_usd: float
    latency_ms: float
    completion: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class MadeTenant:
    """A new tenant; `key` opens the HTTP API for it and is kept nowhere."""

    tenant_id: str
    name: str
    tier: str
    key_id: str
    key: str = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class DistributedOrchestrator:
    """One installation on this machine: the PostgreSQL and Valkey of `home` (default `TUTELAGE_HOME`). They are started when needed, and
    stopped with the last user of that home in this process, unless a `tutelage serve` runs there. Use it as a context, or `close` it."""

    _users: ClassVar[Counter[Path]] = Counter()

    def __init__(self, *, home: Path | str | None = None, config_dir: Path | str | None = None) -> None:
        self.home = Home.from_environment(str(home) if home else None)
        self.config_dir = self.home.config_dir(str(config_dir) if config_dir else None)
        self._engines: engines.Engines | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tutelage")
        self._closed = False
        self._users[self.home.root] += 1

    @property
    def engines(self) -> engines.Engines:
        """Where the stores listen. Raises EngineFailed."""
        if self._engines is None:
            self._engines = self._thread.submit(engines.start, self.home).result()
        return self._engines

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, whether or not the caller is inside an event loop: it runs in a thread of its own."""
        return self._thread.submit(asyncio.run, work).result()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._users[self.home.root] -= 1
        if not self._users[self.home.root] and self._engines is not None and processes.find(self.home, "serve") is None:
            self._thread.submit(engines.stop, self.home).result()
        self._thread.shutdown()

    def __enter__(self) -> DistributedOrchestrator:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class MultiTenantManager:
    """Tenants of an installation. `orchestrator` None: that of the environment's home."""

    def __init__(self, orchestrator: DistributedOrchestrator | None = None) -> None:
        self.orchestrator = orchestrator or DistributedOrchestrator()
        self._own = orchestrator is None
        self._keys: dict[str, tuple[str, str]] = {}  # tenant -> id and text of the key that this program asks with
        self._made: list[str] = []

    def create_tenant(self, name: str, tier: Literal["free", "pro", "enterprise"] = "free") -> MadeTenant:
        """Raises InvalidRequest, Conflict (the name is taken)."""

        async def create(pool: Pool) -> MadeTenant:
            pepper = self.orchestrator.home.secret("pepper")
            tenant, made = await tenancy.create_tenant(pool, pepper, Tenant("", name, tier), maker=MAKER, now=datetime.now(UTC))
            return MadeTenant(tenant.id, tenant.name, tenant.tier, made.key.id, made.text)

        made = self._run(create)
        self._keys[made.tenant_id] = made.key_id, made.key
        return made

    async def key_of(self, pool: Pool, tenant_id: str) -> tuple[str, str]:
        """Id and text of a key to ask with for this tenant; one for a day is made if this program has none. Raises NotFound."""
        if tenant_id not in self._keys:
            if not any(tenant.id == tenant_id for tenant in await tenants.list_tenants(pool)):
                raise NotFound(f"no tenant {tenant_id!r}; MultiTenantManager().create_tenant(name) makes one")
            now = datetime.now(UTC)
            scope = Scope(expires_at=now + timedelta(hours=KEY_HOURS))
            made = await tenancy.create_key(pool, self.orchestrator.home.secret("pepper"), tenant_id, scope, maker=MAKER, now=now)
            self._keys[tenant_id] = made.key.id, made.text
            self._made.append(made.key.id)
        return self._keys[tenant_id]

    def close(self) -> None:
        """Revoke the keys that were made for this program only."""

        async def revoke(pool: Pool) -> None:
            for key_id in self._made:
                await tenancy.revoke_key(pool, key_id, maker=MAKER, now=datetime.now(UTC))

        if self._made:
            self._run(revoke)
        self._made, self._keys = [], {}
        if self._own:
            self.orchestrator.close()

    def _run(self, work: Callable[[Pool], Coroutine[Any, Any, Result]]) -> Result:
        url = self.orchestrator.engines.database_url

        async def connected() -> Result:
            pool = await open_pool(url, size=1)
            try:
                return await work(pool)
            finally:
                await pool.close()

        return self.orchestrator.run(connected())


class APIGateway:
    """The gateway in this process: the app that `tutelage serve` runs, without a port. It belongs to the event loop of its first request;
    use it as an async context, or `aclose` it. Students answer while a `tutelage serve` of this home runs their tier."""

    def __init__(
        self,
        distributed_orchestrator: DistributedOrchestrator | None = None,
        multi_tenant_manager: MultiTenantManager | None = None,
        *,
        enable_caching: bool = True,
        cache_ttl: int | None = None,
    ) -> None:
        """`cache_ttl`: seconds an ordinary answer may be given again; None: as gateway.yaml says."""
        if cache_ttl is not None and cache_ttl < 0:
            raise InvalidRequest(f"cache_ttl {cache_ttl}: seconds are expected, 0 to keep nothing", param="cache_ttl")
        self.tenants = multi_tenant_manager or MultiTenantManager(distributed_orchestrator)
        self._own = multi_tenant_manager is None
        self._orchestrator = distributed_orchestrator or self.tenants.orchestrator
        self._caching, self._ttl = enable_caching, cache_ttl
        self._opening = asyncio.Lock()
        self._opened = AsyncExitStack()
        self._app: wire.Gateway | None = None
        self._http: httpx.AsyncClient | None = None

    async def handle_request(self, request: Request) -> Response:
        """Answer one request: authenticated, limited, cached, routed, recorded and billed as over HTTP.

        Raises:
            TutelageError: the subclass that names what was wrong (Forbidden, LimitReached, Unavailable, …).
        """
        began = time.monotonic()
        state, http = await self._open()
        key_id, key = await self.tenants.key_of(state.admin_pool, request.tenant_id)
        if key_id not in state.watcher.current.keys:
            await state.watcher.refresh()
        headers = {"authorization": f"Bearer {key}", "idempotency-key": request.request_id, **self._options(request)}
        reply = await http.post("/v1/chat/completions", content=orjson.dumps(_body(request)), headers=headers)
        if reply.status_code != 200:
            raise errors.told(reply.json(), status=reply.status_code, retry_after=reply.headers.get("retry-after"))
        return _response(request, reply, (time.monotonic() - began) * 1000)

    async def aclose(self) -> None:
        await self._opened.aclose()
        if self._own:
            await asyncio.to_thread(self.tenants.close)

    async def __aenter__(self) -> APIGateway:
        await self._open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    def _options(self, request: Request) -> dict[str, str]:
        told = {header: str(request.metadata[name]) for name, header in HEADERS.items() if name in request.metadata}
        if request.domain:
            told["x-tutelage-domain"] = request.domain
        return told if self._caching else {**told, "x-tutelage-cache": "bypass"}

    async def _open(self) -> tuple[Any, httpx.AsyncClient]:
        async with self._opening:
            if self._app is None or self._http is None:
                built = await asyncio.to_thread(self._build)
                await self._opened.enter_async_context(built.router.lifespan_context(built))
                transport = httpx.ASGITransport(app=built, raise_app_exceptions=False)
                self._http = await self._opened.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://gateway"))
                self._app = built
            return self._app.state, self._http

    def _build(self) -> wire.Gateway:
        home, config_dir, running = self._orchestrator.home, self._orchestrator.config_dir, self._orchestrator.engines
        prepare_encoder(home.models / "encoder", environment=home.environment())
        tier = f"http://127.0.0.1:{load(TierSettings, config_dir).port}" if processes.find(home, "tier") else None
        over = {} if self._ttl is None else {"cache_ttl_seconds": self._ttl}
        return app.build(
            home, config_dir=config_dir, database_url=running.database_url, valkey_url=running.valkey_url, tier_url=tier, over=over
        )


def _body(request: Request) -> dict[str, Any]:
    asked = {name: value for name, value in request.metadata.items() if name not in HEADERS}
    return {"model": "auto", "messages": [{"role": "user", "content": request.query}], **asked, "stream": False}


def _response(request: Request, reply: httpx.Response, latency_ms: float) -> Response:
    completion, told = reply.json(), reply.headers
    confidence = told.get("x-tutelage-confidence")
    return Response(
        request_id=request.request_id,
        interaction_id=told["x-request-id"],
        answer=completion["choices"][0]["message"].get("content") or "",
        model=told["x-tutelage-model"],
        tier=told["x-tutelage-tier"],
        route=told["x-tutelage-route"],
        domain=told.get("x-tutelage-domain"),
        confidence=float(confidence) if confidence else None,
        cache=told["x-tutelage-cache"],
        cost_usd=float(told["x-tutelage-cost-usd"]),
        latency_ms=latency_ms,
        completion=completion,
    )
