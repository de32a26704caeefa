"""The routes under /v1 and of health: what the client sent is read and checked here, and told in /openapi.json.

It refuses to know how a request is answered (`pipeline.py`) and how HTTP is spoken (`wire.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp

from tutelage.errors import InvalidRequest
from tutelage.gateway import openai, wire
from tutelage.gateway.callers import Caller
from tutelage.gateway.described import schema_of
from tutelage.gateway.dispatch import TIERS
from tutelage.gateway.embeddings import MODEL
from tutelage.gateway.exchange import Options
from tutelage.gateway.idempotency import Idempotency
from tutelage.gateway.pipeline import Pipeline
from tutelage.gateway.turns import PRIORITIES
from tutelage.records import Feedback
from tutelage.routing.strategies import STRATEGIES
from tutelage.stores.interactions import add_feedback
from tutelage.stores.replies import Held, StoredReply

CACHE_WISHES = ("", "bypass", "private")
TRACE_HEADERS = ("traceparent", "tracestate")
BEARER = {"BearerKey": {"type": "http", "scheme": "bearer", "description": "A tenant's key, tut_…; under /admin an operator's."}}


def add_routes(app: wire.Gateway) -> None:
    """Every route under /v1, those of health, and /metrics."""
    for path, handler, body, answer, more in (
        ("/v1/chat/completions", chat, openai.ChatRequest, openai.Completion, CHAT_HEADERS),
        ("/v1/embeddings", embeddings, openai.EmbeddingRequest, openai.EmbeddingList, IDEMPOTENCY),
        ("/v1/feedback", feedback, openai.FeedbackRequest, openai.FeedbackReply, IDEMPOTENCY),
    ):
        app.add_api_route(
            path, handler, methods=["POST"], response_model=None, responses=_answers(answer), openapi_extra=_reads(body, more)
        )
        app.hot["POST", path] = handler
    app.add_api_route(
        "/v1/models", models, methods=["GET"], responses=_answers(openai.ModelList, body=False), openapi_extra={"security": SECURED}
    )
    app.add_api_route("/health/live", live, methods=["GET"], responses={200: {"model": openai.Health}})
    app.add_api_route("/health/ready", ready, methods=["GET"], responses={200: {"model": openai.Health}, 503: {"model": openai.Health}})
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=Response, responses=text)


async def chat(request: Request) -> ASGIApp:
    """Answer a conversation, whole or as a stream of server-sent events."""
    who, state = _caller(request, "chat"), request.app.state
    body = openai.parse_chat(await _body(request))
    options = _options(request)
    if options.strategy is not None:
        who.check_strategy(options.strategy)
    pipeline: Pipeline = state.pipeline
    if not body.stream and "idempotency-key" not in wire.headers_of(request):
        admitted = await pipeline.admit(body, who, options, None)
        try:
            reply = await pipeline.answer(admitted)
        finally:
            pipeline.end(admitted)
        return wire.Whole(reply.content, openai.JSON, reply.headers)
    # what an idempotency key holds is let go when the reply is whole, failed or cut off
    async with AsyncExitStack() as holding:
        claimed = await _claim(request, who, holding, [body.shape, body.stream, *_answer_shaping(options)])
        if isinstance(claimed, StoredReply):
            return _whole(claimed)
        admitted = await pipeline.admit(body, who, options, claimed)
        holding.callback(pipeline.end, admitted)
        if not body.stream:
            reply = await pipeline.answer(admitted)
            return wire.Whole(reply.content, openai.JSON, reply.headers)
        headers, chunks = await pipeline.stream(admitted)
        seconds = state.configuration.current.gateway.send_seconds
        return wire.EventStream(chunks, holding.pop_all(), headers=headers, metrics=state.metrics, seconds=seconds)


async def embeddings(request: Request) -> ASGIApp:
    """Vectors of texts, by the local encoder."""
    who = _caller(request, "embeddings")
    asked: openai.EmbeddingRequest = openai.parse_body(openai.EmbeddingRequest, await _body(request))
    async with AsyncExitStack() as holding:
        claimed = await _claim(request, who, holding, [asked.model_dump()])
        if isinstance(claimed, StoredReply):
            return _whole(claimed)
        return _whole(await request.app.state.embeddings.answer(asked, who, claimed))


async def models(request: Request) -> Response:
    """The models that this key may name."""
    who, state = _caller(request, "models"), request.app.state
    view = state.watcher.current.view(who.tenant_id)
    configured = (entry.name for entry, _ in state.dispatch.models.configured)
    names = ["auto", *TIERS, MODEL, *configured, *(student.name for student in view.students)]
    listed = [{"id": n, "object": "model", "created": 0, "owned_by": "tutelage"} for n in names if who.models is None or n in who.models]
    return JSONResponse({"object": "list", "data": listed})


async def feedback(request: Request) -> ASGIApp:
    """A verdict on an answer: what the loop learns from."""
    who = _caller(request, "feedback")
    said: openai.FeedbackRequest = openai.parse_body(openai.FeedbackRequest, await _body(request))
    async with AsyncExitStack() as holding:
        claimed = await _claim(request, who, holding, [said.model_dump()])
        if isinstance(claimed, StoredReply):
            return _whole(claimed)
        content = orjson.dumps({"object": "feedback", "request_id": said.request_id, "status": "recorded"})
        reply = StoredReply({}, openai.JSON, content)
        given = Feedback(said.request_id, who.tenant_id, said.score, said.label, said.comment)
        await add_feedback(request.app.state.pool, given, (claimed, reply) if claimed else None)
        return _whole(reply)


async def live() -> Response:
    """The process runs."""
    return JSONResponse({"status": "live"})


async def ready(request: Request) -> Response:
    """It can answer: keys were read, and it is not about to stop. Tells the version of its configuration."""
    state = request.app.state
    status = "draining" if state.draining.begun else "ready" if state.watcher.ready else "starting"
    told = {"status": status, "configuration": state.configuration.current.version}
    return JSONResponse(told, status_code=200 if status == "ready" else 503)


async def metrics(request: Request) -> Response:
    """Prometheus' text format, of all workers of this machine."""
    return Response(request.app.state.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _caller(request: Request, route: str) -> Caller:
    caller: Caller = request.app.state.callers.authenticate(wire.headers_of(request).get("authorization"))
    caller.check_route(route)
    return caller


async def _body(request: Request) -> bytes:
    settings = request.app.state.configuration.current.gateway
    return await wire.read_body(request, most_bytes=settings.max_body_bytes, seconds=settings.body_seconds)


def _options(request: Request) -> Options:
    headers = wire.headers_of(request)
    cache, priority = headers.get("x-tutelage-cache", "").lower(), headers.get("x-tutelage-priority", "normal").lower()
    if cache not in CACHE_WISHES:
        raise InvalidRequest(f"x-tutelage-cache: {cache!r} is unknown; allowed: bypass, private", param="x-tutelage-cache")
    if priority not in PRIORITIES:
        raise InvalidRequest(f"x-tutelage-priority: {priority!r} is unknown; allowed: low, normal, high", param="x-tutelage-priority")
    trace = {name: value for name in TRACE_HEADERS if (value := headers.get(name))}
    strategy = headers.get("x-tutelage-strategy", "").lower() or None
    if strategy is not None and strategy not in STRATEGIES:
        raise InvalidRequest(f"x-tutelage-strategy: {strategy!r} is unknown; allowed: {', '.join(STRATEGIES)}", param="x-tutelage-strategy")
    most, least = _number(headers, "x-tutelage-max-cost-usd", 1e9), _number(headers, "x-tutelage-min-confidence", 1.0)
    microusd = None if most is None else int(round(most * 1e6, 3))
    return Options(cache, headers.get("x-tutelage-domain") or None, priority, trace, strategy, microusd, least)  # type: ignore[arg-type]


def _number(headers: Mapping[str, str], name: str, most: float) -> float | None:
    """A header's number above 0. Raises InvalidRequest."""
    text = headers.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        raise InvalidRequest(f"{name}: {text[:40]!r} is no number above 0 and at most {most:g}", param=name)
    return value


def _answer_shaping(options: Options) -> list[Any]:
    """What of the headers may change the answer: the same Idempotency-Key with another is another request."""
    wishes = [options.strategy, options.max_microusd, options.min_confidence]
    return [options.cache, options.domain, *(wishes if any(wish is not None for wish in wishes) else ())]


async def _claim(request: Request, who: Caller, holding: AsyncExitStack, parameters: list[Any]) -> Held | StoredReply | None:
    """What the request's Idempotency-Key stands for; without one, nothing."""
    key = wire.headers_of(request).get("idempotency-key")
    if key is None:
        return None
    idempotency: Idempotency = request.app.state.idempotency
    claimed = await idempotency.claim(who.tenant_id, key, route=request.scope["path"], parameters=parameters)
    if isinstance(claimed, Held):
        await holding.enter_async_context(idempotency.holding(claimed))
    return claimed


def _whole(reply: StoredReply) -> ASGIApp:
    return wire.Whole(reply.body, reply.media_type, reply.headers)


# --- what /openapi.json tells: bodies are read by hand, so that errors keep OpenAI's shape and the framework stays out of the way ---

SECURED: list[dict[str, list[str]]] = [{"BearerKey": []}]
FAULTS = {
    400: "The request cannot be understood",
    401: "No key, or none that opens anything",
    403: "The key may not do this, or its tenant is suspended",
    404: "Nothing has this name",
    408: "The body did not arrive in time",
    409: "The Idempotency-Key is in use",
    413: "The body is too large",
    422: "The Idempotency-Key was used with another request",
    429: "A limit is reached; retry-after says when to come back",
    503: "Nothing can answer now; retry-after says when to come back",
}


def _header(name: str, told: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": told, "schema": {"type": "string", **schema}}


IDEMPOTENCY = [_header("Idempotency-Key", "Send it again with the same key and get the same reply", minLength=1, maxLength=255)]
CHAT_HEADERS = [
    *IDEMPOTENCY,
    _header("x-tutelage-priority", "Who goes first when there is a queue", enum=["low", "normal", "high"]),
    _header("x-tutelage-cache", "bypass: ask a model anyway; private: neither look up nor keep", enum=["bypass", "private"]),
    _header("x-tutelage-domain", "The domain, where the client knows it"),
    _header("x-tutelage-strategy", "How this request is answered, instead of as the tenant's are", enum=list(STRATEGIES)),
    _header("x-tutelage-max-cost-usd", "What its answer may cost at most, in US dollars"),
    _header(
        "x-tutelage-min-confidence",
        "The least quality that the answer is promised, above 0 to 1: where outcomes do not assure it, the teacher answers",
    ),
]


def _answers(kind: Any, *, body: bool = True) -> dict[int | str, dict[str, Any]]:
    faults = {status: told for status, told in FAULTS.items() if body or status in (401, 403, 503)}
    return {200: {"model": kind}, **{status: {"model": openai.Error, "description": told} for status, told in faults.items()}}


def _reads(kind: Any, headers: list[dict[str, Any]]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema_of(kind)}}
    return {"requestBody": {"required": True, "content": content}, "parameters": headers, "security": SECURED}
