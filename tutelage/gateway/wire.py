"""HTTP as the endpoints see it: a body within its bounds, an error in OpenAI's shape, a stream that nobody can hold up.

It refuses to know what is asked and answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tutelage.deadlines import Deadline
from tutelage.errors import BodyBrokenOff, BodyTooLarge, InvalidRequest, MethodNotAllowed, NotFound, RequestTimeout, TutelageError
from tutelage.gateway import openai
from tutelage.telemetry import Metrics

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[ASGIApp]]


def headers_of(request: Request) -> dict[str, str]:
    """The request's headers by lower-case name, read once; of a header sent twice the last counts."""
    known: dict[str, str] | None = request.scope.get("tutelage.headers")
    if known is None:
        known = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}
        request.scope["tutelage.headers"] = known
    return known


class Whole:
    """A successful reply, as it is: a third of what the framework's own response costs."""

    def __init__(self, content: bytes, media_type: str, headers: Mapping[str, str]) -> None:
        self._content, self._type, self._headers = content, media_type, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = [(b"content-type", self._type.encode()), (b"content-length", b"%d" % len(self._content))]
        told += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": told})
        await send({"type": "http.response.body", "body": self._content})


class Gateway(FastAPI):
    """FastAPI, but for the routes in `hot`: those skip its layers, which cost more (60 µs) than all we do with a cached answer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.hot: dict[tuple[str, str], Handler] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self.hot.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        request = Request(scope, receive, send)
        try:
            response = await handler(request)
        except TutelageError as error:
            response = refusal(error, self.state.metrics)
        except Exception:
            log.exception("request failed")
            response = refusal(TutelageError("something went wrong on our side; the log has the details"), self.state.metrics)
        await response(scope, receive, send)


def refusal(error: TutelageError, metrics: Metrics) -> Response:
    """The response that says what was wrong."""
    metrics.errors.labels(error.code).inc()
    headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    # a client that tried again elsewhere may still be sending its body here: the connection cannot be used again
    if isinstance(error, BodyBrokenOff | BodyTooLarge | RequestTimeout):
        headers["connection"] = "close"
    return Response(orjson.dumps(error.body()), status_code=error.status, headers=headers, media_type=openai.JSON)


def answer_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error of a route that FastAPI serves, in OpenAI's shape."""

    @app.exception_handler(TutelageError)
    async def known(_: Request, error: TutelageError) -> Response:
        return refusal(error, metrics)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return refusal(NotFound(f"no {request.method} {request.url.path} here; see /openapi.json"), metrics)
        if error.status_code == 405:
            response = refusal(MethodNotAllowed(f"{request.method} is not allowed on {request.url.path}; see /openapi.json"), metrics)
            response.headers["allow"] = ", ".join(_methods(app, request))
            return response
        wrong = InvalidRequest(f"{request.method} {request.url.path}: {error.detail}")
        wrong.status = error.status_code
        return refusal(wrong, metrics)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return refusal(InvalidRequest(f"{where}: {first['msg']}", param=where), metrics)

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> Response:
        log.error("request failed", exc_info=error)
        return refusal(TutelageError("something went wrong on our side; the log has the details"), metrics)


def _methods(app: FastAPI, request: Request) -> list[str]:
    """All that a path takes: the framework tells those of the first route it meets."""
    matched = (route for route in app.routes if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE)
    return sorted({method for route in matched for method in route.methods or ()})


async def read_body(request: Request, *, most_bytes: int, seconds: float) -> bytes:
    """The whole body.

    Raises:
        BodyBrokenOff: the client left, or its chunks are not well formed; the server tells us no difference.
        BodyTooLarge: as soon as that is known.
        RequestTimeout: it did not arrive within `seconds`.
    """
    declared = headers_of(request).get("content-length", "")
    if declared.isdigit() and int(declared) > most_bytes:
        raise BodyTooLarge(f"the body has {declared} bytes; at most {most_bytes} are accepted")
    received, more = bytearray(), True
    try:
        with Deadline(asyncio.get_running_loop().time() + seconds):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise BodyBrokenOff("the body broke off; send all of it, in chunks that are well formed or with its content-length")
                more = message.get("more_body", False)
                received += message.get("body", b"")
                if len(received) > most_bytes:
                    raise BodyTooLarge(f"the body has more than the {most_bytes} bytes that are accepted")
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {seconds:g} seconds; send it in one go") from None
    return bytes(received)


class EventStream(StreamingResponse):
    """Server-sent events of `chunks`. They are closed, and what `holding` holds is let go, as soon as the client is gone or takes none
    for `seconds`, so that what feeds them can stop and settle."""

    media_type = openai.EVENTS

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any], None],
        holding: AsyncExitStack,
        *,
        headers: dict[str, str],
        metrics: Metrics,
        seconds: float,
    ) -> None:
        self._chunks, self._holding, self._metrics, self._seconds = chunks, holding, metrics, seconds
        super().__init__(self._events(), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def in_time(message: Message) -> None:
            with Deadline(asyncio.get_running_loop().time() + self._seconds):
                await send(message)

        try:
            await super().__call__(scope, receive, in_time)
        except* TimeoutError:
            log.warning("a client took nothing of its stream for %g seconds and was cut off", self._seconds)
        finally:
            await self._chunks.aclose()
            await self._holding.aclose()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """A failure after the first byte ends in a typed error event and never in [DONE]."""
        try:
            async for chunk in self._chunks:
                yield openai.event(chunk)
            await self._holding.aclose()  # the last thing that may fail, before the client is told that all is well
            yield openai.DONE
        except TutelageError as error:
            self._metrics.errors.labels(error.code).inc()
            yield openai.event(error.body())
        except Exception:
            log.exception("a stream failed")
            yield openai.event(TutelageError("something went wrong on our side; the log has the details").body())
