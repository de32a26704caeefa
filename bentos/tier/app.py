"""The tier over HTTP: chat, models, and the authenticated control of adapters.

Knows FastAPI and turns every error into OpenAI's shape. It refuses to know BentoML and where settings come from.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from bentos.tier import wire
from bentos.tier.batcher import Batcher, Job
from bentos.tier.settings import ServiceSettings
from inference.generation import Completion, Engine
from tutelage.errors import (
    AdapterRejected,
    BodyTooLarge,
    Forbidden,
    InvalidRequest,
    NotFound,
    TutelageError,
    Unauthenticated,
    Unavailable,
)

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 1024 * 1024
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
DIGEST_HEADER = "x-tutelage-adapter-digest"

router = APIRouter()


class AdapterFiles(BaseModel):
    """Body of `PUT /control/adapters/{name}`: an absolute folder and the digest its adapter must have."""

    model_config = ConfigDict(strict=True, extra="forbid")
    path: str
    digest: str


@dataclass(frozen=True)
class Tier:
    """What the handlers work with. `thread` is the one that generates; `started` is Unix time in seconds."""

    engine: Engine
    batcher: Batcher
    settings: ServiceSettings
    thread: ThreadPoolExecutor
    started: int
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def close(self) -> None:
        await self.batcher.close()
        self.thread.shutdown(wait=False, cancel_futures=True)


def create_app() -> FastAPI:
    """Return the app without a tier; it answers 503 until `app.state.tier` is set."""
    app = FastAPI(title="Tutelage tier", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.tier = None
    app.include_router(router)
    app.add_exception_handler(TutelageError, _known_error)
    app.add_exception_handler(HTTPException, _routing_error)
    app.add_exception_handler(Exception, _unknown_error)
    return app


async def start_tier(base_dir: Path, settings: ServiceSettings) -> Tier:
    """Load the base in the thread that will generate, and start its batches."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tier-engine")

    def load() -> Engine:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        return Engine(base_dir, threads=settings.threads, quantization=settings.quantization)

    engine = await asyncio.get_running_loop().run_in_executor(thread, load)
    batcher = Batcher(
        engine,
        thread=thread,
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        window_seconds=settings.window_ms / 1000,
    )
    return Tier(engine, batcher, settings, thread, int(time.time()))


@router.post("/v1/chat/completions")
async def chat(http: HttpRequest) -> Response:
    tier = _tier(http)
    asked = wire.parse(await _body(http))
    generation = asked.generation(default_max_tokens=tier.settings.max_tokens)
    job = await tier.batcher.submit(generation, streamed=bool(asked.stream))
    reply = wire.Reply(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=asked.model,
        digest=job.digest,
        logprobs=bool(asked.logprobs),
    )
    headers = {DIGEST_HEADER: job.digest}
    if asked.stream:
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = _events(job, reply, include_usage=include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    answer = await _answer_unless_gone(job, http)
    return JSONResponse(wire.completion(reply, answer), headers=headers)


@router.get("/v1/models")
async def models(http: HttpRequest) -> JSONResponse:
    tier = _tier(http)

    def card(name: str, digest: str, parent: str | None) -> dict[str, Any]:
        head = {"id": name, "object": "model", "created": tier.started, "owned_by": "tutelage"}
        return {**head, "parent": parent, "digest": digest}

    adapters = [card(name, digest, wire.BASE) for name, digest in sorted(tier.engine.adapters().items())]
    return JSONResponse({"object": "list", "data": [card(wire.BASE, tier.engine.fingerprint, None), *adapters]})


@router.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
async def nothing_there(http: HttpRequest) -> JSONResponse:
    """BentoML answers paths that no route here takes, in a shape OpenAI clients cannot read."""
    raise NotFound(f"{http.method} {http.url.path} does not exist; see GET /v1/models and POST /v1/chat/completions")


@router.get("/control/adapters")
async def list_adapters(http: HttpRequest) -> JSONResponse:
    tier = _tier(http)
    _authenticate(http, tier.settings.token)
    adapters = [{"name": name, "digest": digest} for name, digest in sorted(tier.engine.adapters().items())]
    return JSONResponse({"base_fingerprint": tier.engine.fingerprint, "adapters": adapters})


@router.put("/control/adapters/{name:path}")
async def put_adapter(http: HttpRequest, name: str) -> JSONResponse:
    """Load or replace an adapter. Refused files give 422 with the reason, and what `name` served keeps serving."""
    tier = _tier(http)
    _authenticate(http, tier.settings.token)
    _check_name(name)
    files = _adapter_files(await _body(http))
    async with tier.changing:
        path = _allowed_path(files.path, tier.settings.student_roots)
        info = await asyncio.to_thread(tier.engine.load_adapter, name, path, files.digest)
    log.info("adapter %s is now %s", name, info.digest)
    return JSONResponse({"name": name, "digest": info.digest, "rank": info.rank, "parameters": info.parameters})


@router.delete("/control/adapters/{name:path}")
async def delete_adapter(http: HttpRequest, name: str) -> JSONResponse:
    tier = _tier(http)
    _authenticate(http, tier.settings.token)
    async with tier.changing:
        await asyncio.to_thread(tier.engine.unload_adapter, name)
    log.info("adapter %s is no longer served", name)
    return JSONResponse({"name": name, "deleted": True})


def _tier(http: HttpRequest) -> Tier:
    tier = http.app.state.tier
    if not isinstance(tier, Tier):
        raise Unavailable("this tier is still loading its base; try again in a few seconds")
    return tier


async def _body(http: HttpRequest) -> bytes:
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes; send shorter messages")
    return bytes(body)


async def _answer_unless_gone(job: Job, http: HttpRequest) -> Completion:
    """Wait for the answer; when the client hangs up first, drop the row and stop waiting."""
    answer = asyncio.create_task(job.completion())
    gone = asyncio.create_task(_hung_up(http))
    try:
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Unavailable("the client closed the connection before the answer was complete")
        return answer.result()
    finally:
        job.cancel()
        answer.cancel()
        gone.cancel()


async def _hung_up(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(job: Job, reply: wire.Reply, *, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of one reply. An error after the first event can only be told as an event."""
    try:
        yield _event(wire.chunk(reply, {"role": "assistant", "content": ""}, []))
        async for item in job.tokens():
            if not isinstance(item, Completion):
                yield _event(wire.chunk(reply, {"content": item.text}, [item]))
                continue
            yield _event(wire.last_chunk(reply, item))
            if include_usage:
                yield _event(wire.usage_chunk(reply, item))
    except TutelageError as error:
        yield _event(error.body())
    finally:
        job.cancel()
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _authenticate(http: HttpRequest, token: str | None) -> None:
    if token is None:
        raise Forbidden("adapter control is off: set TUTELAGE_TIER_TOKEN (16 characters or more) and restart this tier")
    scheme, _, given = http.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
        raise Unauthenticated("adapter control needs the header `authorization: Bearer <TUTELAGE_TIER_TOKEN>`")


def _check_name(name: str) -> None:
    if name == wire.BASE or not ADAPTER_NAME.fullmatch(name):
        raise InvalidRequest(
            f"adapter name {name!r} is not allowed: 1 to 128 letters, digits and . _ : / -, starting with a letter or "
            f"digit, and not {wire.BASE!r}",
            param="name",
        )


def _adapter_files(body: bytes) -> AdapterFiles:
    try:
        return AdapterFiles.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{where or 'body'}: {first['msg']}", param=where or None) from error


def _allowed_path(path: str, roots: tuple[Path, ...]) -> Path:
    """Resolve links first, so that no link inside a root leads out of it."""
    if not roots:
        raise AdapterRejected("this tier may load adapters from nowhere: set TUTELAGE_STUDENTS_DIR and restart it")
    asked = Path(path)
    if not asked.is_absolute() or "\0" in path:
        raise AdapterRejected(f"path {path!r} must be absolute, inside {', '.join(map(str, roots))}", param="path")
    resolved = asked.resolve()
    if not any(resolved.is_relative_to(root.resolve()) for root in roots):
        raise AdapterRejected(f"path {path!r} must lie inside {', '.join(map(str, roots))}", param="path")
    return resolved


async def _known_error(_http: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, TutelageError)
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _routing_error(http: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    known = InvalidRequest(f"{http.method} {http.url.path}: {error.detail}")
    return JSONResponse(known.body(), status_code=error.status_code, headers=error.headers)


async def _unknown_error(_http: HttpRequest, error: Exception) -> JSONResponse:
    log.error("unexpected error", exc_info=error)
    body = TutelageError("the tier failed unexpectedly; the cause is in its log").body()
    return JSONResponse(body, status_code=500)
