"""The ASGI app: HTTP in, HTTP out, errors in OpenAI's shape. It refuses to know how a request is answered (`pipeline.py`)."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import httpx
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from tutelage import __version__
from tutelage.errors import BodyTooLarge, InvalidRequest, NotFound, TutelageError, Unavailable
from tutelage.fleet import backends
from tutelage.gateway import openai
from tutelage.gateway.admission import Admission, Estimate, Lost, Party, Used
from tutelage.gateway.cache import ExactCache
from tutelage.gateway.embeddings import MODEL, Embeddings
from tutelage.gateway.idempotency import Idempotency
from tutelage.gateway.pipeline import TIERS, Asked, Caller, Models, Options, Pipeline
from tutelage.gateway.snapshot import Watcher
from tutelage.records import Feedback
from tutelage.routing.encoder import Encoder
from tutelage.settings import GatewaySettings, Home, ModelsSettings, RoutingSettings, TierSettings, load
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.interactions import Recorder, add_feedback, add_lost, used
from tutelage.stores.replies import Held, StoredReply
from tutelage.telemetry import Metrics, log_to_stderr

log = logging.getLogger(__name__)


def create() -> FastAPI:
    """The app as a server process starts it; everything comes from the environment set by `tutelage serve`."""
    log_to_stderr()
    home = Home.from_environment()
    return build(
        home,
        config_dir=home.config_dir(),
        database_url=os.environ["TUTELAGE_DATABASE_URL"],
        valkey_url=os.environ["TUTELAGE_VALKEY_URL"],
        tier_url=os.environ.get("TUTELAGE_TIER_URL"),
    )


@dataclass(frozen=True)
class Setup:
    """Where a gateway worker's state and neighbours are, and every setting it reads."""

    home: Home
    database_url: str
    valkey_url: str
    tier_url: str | None
    gateway: GatewaySettings
    routing: RoutingSettings
    tier: TierSettings
    models: ModelsSettings


def build(home: Home, *, config_dir: Path, database_url: str, valkey_url: str, tier_url: str | None) -> FastAPI:
    """The app of one gateway worker; what it needs is opened when it starts and closed when it stops."""
    setup = Setup(
        home,
        database_url,
        valkey_url,
        tier_url,
        gateway=load(GatewaySettings, config_dir),
        routing=load(RoutingSettings, config_dir),
        tier=load(TierSettings, config_dir),
        models=load(ModelsSettings, config_dir),
    )
    app = FastAPI(title="Tutelage", version=__version__, lifespan=partial(_open, setup=setup), docs_url=None, redoc_url=None)
    app.state.metrics, app.state.settings = Metrics(), setup.gateway
    _answer_errors(app, app.state.metrics)
    _add_routes(app)
    return app


@asynccontextmanager
async def _open(app: FastAPI, *, setup: Setup) -> AsyncIterator[None]:
    """The one place where a gateway worker is wired together. What others use is closed after them."""
    settings = setup.gateway
    async with AsyncExitStack() as opened:
        pool = await open_pool(setup.database_url)
        opened.push_async_callback(pool.close)
        client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))
        opened.push_async_callback(client.aclose)
        encoder = Encoder(setup.home.models / "encoder", threads=1)
        cache = ExactCache(setup.valkey_url, ttl_seconds=settings.cache_ttl_seconds, deadline_seconds=settings.cache_deadline_seconds)
        opened.push_async_callback(cache.close)
        admission = _admission(setup, pool)
        opened.push_async_callback(admission.close)
        recorder = Recorder(
            pool,
            flush_seconds=settings.record_flush_seconds,
            batch_rows=settings.record_batch_rows,
            deadline_seconds=settings.record_deadline_seconds,
        )
        opened.push_async_callback(recorder.stop)
        watcher = Watcher(pool, seconds=settings.snapshot_seconds, threshold=setup.routing.threshold)
        idempotency = Idempotency(pool, lease_seconds=settings.idempotency_lease_seconds)
        models, metrics = _models(setup, client, encoder), app.state.metrics
        pipeline = Pipeline(
            watcher=watcher,
            cache=cache,
            recorder=recorder,
            admission=admission,
            encoder=encoder,
            models=models,
            routing=setup.routing,
            reserve_tokens=settings.reserve_tokens,
            secret=setup.home.secret("pepper"),
            metrics=metrics,
        )
        opened.push_async_callback(pipeline.close)
        app.state.pool, app.state.watcher, app.state.models, app.state.idempotency = pool, watcher, models, idempotency
        app.state.pipeline = pipeline
        app.state.embeddings = Embeddings(
            encoder, admission=admission, recorder=recorder, metrics=metrics, core_hour_usd=setup.tier.core_hour_usd
        )
        recorder.start()
        for part in (watcher, admission, idempotency):
            await part.start()
        for part in (watcher, idempotency):
            opened.push_async_callback(part.stop)
        yield


def _models(setup: Setup, client: httpx.AsyncClient, encoder: Encoder) -> Models:
    """The configured backends, and a client of the local tier for any adapter name."""

    def adapter(name: str) -> backends.OpenAIBackend:
        return backends.OpenAIBackend(
            name,
            client,
            base_url=f"{setup.tier_url or 'http://127.0.0.1:9'}/v1",
            model=name,
            api_key=None,
            price=None,
            timeout_seconds=setup.tier.timeout_seconds,
            count_tokens=encoder.count_tokens,
            core_hour_usd=setup.tier.core_hour_usd,
        )

    configured = ((entry, backends.build(entry, client, count_tokens=encoder.count_tokens)) for entry in setup.models.models)
    return Models(tuple(configured), adapter)


def _admission(setup: Setup, pool: Pool) -> Admission:
    return Admission(
        setup.valkey_url,
        used=partial(_used, pool),
        lost=partial(_settle_lost, pool),
        deadline_seconds=setup.gateway.admission_deadline_seconds,
        slot_seconds=setup.gateway.slot_seconds,
    )


async def _used(pool: Pool, party: Party, now: datetime) -> Used:
    """What the ledger says. Raises Unavailable: without it nobody knows what is left."""
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    try:
        return Used(*await used(pool, party.tenant_id, party.id if party.scope == "key" else None, day=day, month=day.replace(day=1)))
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as broken:
        raise Unavailable("how much of the limits is used cannot be looked up; try again shortly") from broken


async def _settle_lost(pool: Pool, lost: Lost) -> Estimate:
    """Bill a request whose worker died at what it had reserved, unless its interaction was recorded before; what is on the bill."""
    return Estimate(
        *await add_lost(
            pool,
            request_id=lost.request_id,
            tenant_id=lost.tenant_id,
            key_id=lost.key_id,
            at=lost.at,
            tokens=lost.reserved.tokens,
            cost_microusd=lost.reserved.cost_microusd,
        )
    )


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    def respond(error: TutelageError) -> Response:
        metrics.errors.labels(error.code).inc()
        headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else {}
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(TutelageError)
    async def known(_: Request, error: TutelageError) -> Response:
        return respond(error)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return respond(NotFound(f"no {request.method} {request.url.path} here; see /openapi.json"))
        wrong = InvalidRequest(f"{request.method} {request.url.path}: {error.detail}")
        wrong.status = error.status_code
        return respond(wrong)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return respond(InvalidRequest(str(error.errors()[0]["msg"])))

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> Response:
        log.error("request failed", exc_info=error)
        return respond(TutelageError("something went wrong on our side; the log has the details"))


async def _body(request: Request) -> bytes:
    """The whole body, refused as soon as it is known to be too large."""
    limit = request.app.state.settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    received = bytearray()
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(f"the body has {declared} bytes; at most {limit} are accepted")
    async for piece in request.stream():
        received += piece
        if len(received) > limit:
            raise BodyTooLarge(f"the body has more than the {limit} bytes that are accepted")
    return bytes(received)


def _schema(kind: Any) -> dict[str, Any]:
    """The request body for /openapi.json; bodies are parsed by hand so that errors keep OpenAI's shape."""
    content = {"application/json": {"schema": kind.model_json_schema(ref_template="#/components/schemas/{model}")}}
    return {"requestBody": {"required": True, "content": content}}


def _add_routes(app: FastAPI) -> None:
    def caller(request: Request) -> Caller:
        pipeline: Pipeline = request.app.state.pipeline
        return pipeline.authenticate(request.headers.get("authorization"))

    @app.post("/v1/chat/completions", openapi_extra=_schema(openai.ChatRequest))
    async def chat(request: Request) -> Response:
        who = caller(request)
        body: openai.ChatRequest = openai.parse_body(openai.ChatRequest, await _body(request))
        options = Options(
            cache=request.headers.get("x-tutelage-cache", "").lower(), domain=request.headers.get("x-tutelage-domain") or None
        )
        pipeline: Pipeline = request.app.state.pipeline
        # what an idempotency key holds is let go when the reply is whole, failed or cut off
        async with AsyncExitStack() as holding:
            claimed = await _claim(request, who, holding, [body.model_dump(exclude_none=True), options.cache, options.domain])
            if isinstance(claimed, StoredReply):
                return _whole(claimed)
            meter = await holding.enter_async_context(pipeline.admit(body, who))
            asked = Asked(body, who, options, claimed, meter, time.monotonic())
            if body.stream:
                headers, chunks = await pipeline.stream(asked)
                return EventStream(_events(chunks, holding.pop_all(), request.app.state.metrics), headers=headers)
            reply = await pipeline.answer(asked)
            return Response(reply.content, media_type=openai.JSON, headers=reply.headers)

    @app.post("/v1/embeddings", openapi_extra=_schema(openai.EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        who = caller(request)
        asked: openai.EmbeddingRequest = openai.parse_body(openai.EmbeddingRequest, await _body(request))
        async with AsyncExitStack() as holding:
            claimed = await _claim(request, who, holding, [asked.model_dump()])
            if isinstance(claimed, StoredReply):
                return _whole(claimed)
            return _whole(await request.app.state.embeddings.answer(asked, who, claimed))

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        who = caller(request)
        view = request.app.state.watcher.current.view(who.tenant_id)
        names = ["auto", *TIERS, MODEL, *(entry.name for entry, _ in request.app.state.models.configured), *(s.name for s in view.students)]
        return {"object": "list", "data": [{"id": n, "object": "model", "created": 0, "owned_by": "tutelage"} for n in names]}

    @app.post("/v1/feedback", openapi_extra=_schema(openai.FeedbackRequest))
    async def feedback(request: Request) -> Response:
        who = caller(request)
        said: openai.FeedbackRequest = openai.parse_body(openai.FeedbackRequest, await _body(request))
        async with AsyncExitStack() as holding:
            claimed = await _claim(request, who, holding, [said.model_dump()])
            if isinstance(claimed, StoredReply):
                return _whole(claimed)
            content = json.dumps({"object": "feedback", "request_id": said.request_id, "status": "recorded"}).encode()
            reply = StoredReply({}, openai.JSON, content)
            given = Feedback(said.request_id, who.tenant_id, said.score, said.label, said.comment)
            await add_feedback(request.app.state.pool, given, (claimed, reply) if claimed else None)
            return _whole(reply)

    _add_health(app)


def _add_health(app: FastAPI) -> None:
    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready(request: Request) -> Response:
        known = request.app.state.watcher.ready
        return JSONResponse({"status": "ready" if known else "starting"}, status_code=200 if known else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(request.app.state.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _claim(request: Request, who: Caller, holding: AsyncExitStack, parameters: list[Any]) -> Held | StoredReply | None:
    """What the request's Idempotency-Key stands for; without one, nothing."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    idempotency: Idempotency = request.app.state.idempotency
    claimed = await idempotency.claim(who.tenant_id, key, route=request.url.path, parameters=parameters)
    if isinstance(claimed, Held):
        await holding.enter_async_context(idempotency.holding(claimed))
    return claimed


def _whole(reply: StoredReply) -> Response:
    return Response(reply.body, media_type=reply.media_type, headers=reply.headers)


class EventStream(StreamingResponse):
    """Server-sent events that are closed as soon as the client is gone, so that what feeds them can stop and settle."""

    media_type = openai.EVENTS
    body_iterator: AsyncGenerator[bytes, None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()


async def _events(chunks: AsyncGenerator[dict[str, Any], None], holding: AsyncExitStack, metrics: Metrics) -> AsyncGenerator[bytes, None]:
    """Server-sent events; a failure after the first byte ends in a typed error event and never in [DONE]."""
    try:
        async with holding, aclosing(chunks):
            async for chunk in chunks:
                yield openai.event(chunk)
            yield openai.DONE
    except TutelageError as error:
        metrics.errors.labels(error.code).inc()
        yield openai.event(error.body())
    except Exception:
        log.exception("a stream failed")
        yield openai.event(TutelageError("something went wrong on our side; the log has the details").body())
