"""One model's HTTP endpoint: its replicas, each with connections and a breaker of its own, so that one that hangs stalls no other.

Within the deadlines it calls the better of two replicas, tries again elsewhere within the budget, and says what went wrong. It refuses to
know what is asked: bytes out, bytes or server-sent events in.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TypeVar

import yarl

from tutelage.deadlines import Deadline
from tutelage.errors import BackendErred, BackendFailed, BackendRefused
from tutelage.fleet import retries
from tutelage.fleet.breaker import Breaker, State
from tutelage.fleet.connections import BodyTooLong, Connections, NoConnection, Response
from tutelage.fleet.retries import MOST_RETRIES, Budget

RETRY_STATUS = {408, 409, 425, 500, 502, 503, 504}
MOST_BYTES = 32 * 1024 * 1024  # of a reply, or of one event
MOST_STREAM_BYTES = 1024 * 1024 * 1024
MOST_TOLD = 2_000  # of what a server says went wrong
DONE = b"[DONE]"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Deadlines:
    """Seconds. `connect` includes the wait for a free connection; `total` ends streams too."""

    connect: float = 5.0
    first_token: float = 30.0
    idle: float = 30.0
    total: float = 60.0


@dataclass(frozen=True)
class ReplicaHealth:
    """What operators see of a replica."""

    model: str
    url: str
    state: State
    in_flight: int
    failures: int
    ejections: int
    retry_in_seconds: float
    last_error: str | None


@dataclass(eq=False)
class Replica:
    url: yarl.URL
    connections: Connections
    breaker: Breaker = field(default_factory=Breaker)
    in_flight: int = 0
    last_error: str | None = None


class Failed(Exception):
    """One call of one replica; `again` whether another may help, `sent` whether the replica may have worked on it, `asked` how long it
    wants to be left alone."""

    def __init__(self, told: str, *, again: bool, sent: bool = True, asked: float | None = None) -> None:
        super().__init__(told)
        self.again, self.sent, self.asked = again, sent, asked


class Endpoint:
    """`name` is the model's, for messages. Connections are opened when they are needed and closed by `close`. `shared`: many models stand
    behind it, so an HTTP 500 tells of the one that was asked and neither is tried again nor speaks against the replica."""

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        *,
        headers: dict[str, str],
        deadlines: Deadlines,
        connections: int,
        refusal: Callable[[int, bytes], Exception],
        shared: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.name = name
        told = {"content-type": "application/json", "accept": "*/*", "accept-encoding": "identity", "user-agent": "tutelage", **headers}
        places = [yarl.URL(url.rstrip("/") + "/chat/completions") for url in urls]
        self._replicas = [
            Replica(place, Connections(place, headers=told, most=connections, connect_seconds=deadlines.connect)) for place in places
        ]
        self._deadlines = deadlines
        self._refusal = refusal
        self._shared = shared
        self._monotonic = monotonic
        self._chance = chance
        self._budget = Budget()

    async def close(self) -> None:
        for replica in self._replicas:
            replica.connections.close()

    def health(self) -> list[ReplicaHealth]:
        now = self._monotonic()
        return [
            ReplicaHealth(
                self.name, _plain(r.url), r.breaker.state(now), r.in_flight, r.breaker.failures, r.breaker.ejections,
                round(r.breaker.until(now), 3), r.last_error,
            )
            for r in self._replicas
        ]  # fmt: skip

    async def post(self, body: bytes) -> bytes:
        """The whole reply to a successful call.

        Raises:
            BackendFailed: no replica answered in time; another model may.
            BackendErred: the server did, but that the model failed.
            BackendRefused: this request is at fault.
        """
        return await self._tried(partial(self._whole, body, asyncio.get_running_loop().time() + self._deadlines.total))

    async def events(self, body: bytes) -> AsyncGenerator[bytes, None]:
        """The data of each server-sent event before [DONE]. Until the first one another replica may take over. Raises as `post`."""
        ends = asyncio.get_running_loop().time() + self._deadlines.total

        async def begun(replica: Replica) -> tuple[AsyncGenerator[bytes, None], bytes | None]:
            stream = self._streamed(body, ends, replica)
            try:
                return stream, await anext(stream, None)
            except BaseException:
                await stream.aclose()
                raise

        stream, first = await self._tried(begun)
        async with aclosing(stream):
            if first is None:
                return
            yield first
            try:
                async for data in stream:
                    yield data
            except Failed as failed:
                raise BackendFailed(f"model {self.name} broke off: {failed}") from failed

    async def _tried(self, call: Callable[[Replica], Awaitable[Result]]) -> Result:
        """The result of a call, by whichever replica gives one."""
        self._budget.called(self._monotonic())
        tried: list[Replica] = []
        for retry in range(MOST_RETRIES + 1):
            replica = self._choose(tried)
            try:
                return await call(replica)
            except Failed as failed:
                tried.append(replica)
                told = f"model {self.name} did not answer: {failed}"
                if not failed.again or retry == MOST_RETRIES:
                    raise BackendFailed(told) from failed
                now = self._monotonic()
                elsewhere = any(r not in tried and not r.breaker.until(now) for r in self._replicas)
                wait = 0.0 if elsewhere else retries.wait_seconds(retry, chance=self._chance(), asked=failed.asked)
                # a call that never arrived has cost nobody anything: trying it elsewhere can start no storm
                if wait is None or (failed.sent and not self._budget.take(now)):
                    raise BackendFailed(told, retry_after=math.ceil(failed.asked or 5)) from failed
                await asyncio.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    def _choose(self, tried: Sequence[Replica]) -> Replica:
        """The less busy of two that may be called, those not `tried` first. Raises BackendFailed when none may."""
        now = self._monotonic()
        for group in ([r for r in self._replicas if r not in tried], list(tried)):
            able = [r for r in group if not r.breaker.until(now)]
            while able:
                pair = [able[int(self._chance() * len(able)) % len(able)] for _ in range(2)]
                best = min(pair, key=lambda r: r.in_flight)
                if best.breaker.admits(now):
                    return best
                able.remove(best)
        seconds = min(replica.breaker.until(now) for replica in self._replicas)
        raise BackendFailed(f"model {self.name} failed too often and is left alone for {seconds:.0f} s", retry_after=max(1, round(seconds)))

    async def _whole(self, body: bytes, ends: float, replica: Replica) -> bytes:
        with Call(replica, self._monotonic, self._deadlines), Deadline(ends):
            async with await replica.connections.post(body) as response:
                if response.status != 200:
                    raise await self._unwanted(response)
                return await response.read(MOST_BYTES)

    async def _unwanted(self, response: Response) -> Exception:
        """What a status other than 200 amounts to."""
        content = (await response.read(MOST_BYTES))[:MOST_TOLD]
        if response.status == 429:
            return Failed("it is asked too often (HTTP 429)", again=True, asked=_seconds(response.header("retry-after")))
        if response.status == 500 and self._shared:
            return BackendErred(f"model {self.name} failed: HTTP 500")
        if response.status in RETRY_STATUS or response.status >= 500:
            return Failed(f"HTTP {response.status}", again=True)
        if response.status in (401, 403) or 300 <= response.status < 400:
            # our own credentials and address are not the client's fault, and what the provider says of them is not its business
            return Failed(f"HTTP {response.status}", again=False)
        return self._refusal(response.status, content)

    async def _streamed(self, body: bytes, ends: float, replica: Replica) -> AsyncGenerator[bytes, None]:
        loop, parser, wait = asyncio.get_running_loop(), EventParser(), self._deadlines.first_token
        with Call(replica, self._monotonic, self._deadlines):
            with Deadline(min(ends, loop.time() + wait)):
                response = await replica.connections.post(body)
            async with response:
                if response.status != 200:
                    with Deadline(ends):
                        raise await self._unwanted(response)
                pieces = response.pieces(MOST_STREAM_BYTES)
                while True:
                    with Deadline(min(ends, loop.time() + wait)):
                        piece = await anext(pieces, None)
                    if piece is None:
                        raise Failed("its stream ended before it was done", again=wait is self._deadlines.first_token)
                    for data in parser.feed(piece):
                        if data == DONE:
                            return
                        wait = self._deadlines.idle
                        yield data


class Call:
    """One call of a replica, while the block runs: how it went is told to its breaker, and whatever goes wrong becomes Failed,
    BackendErred or BackendRefused."""

    __slots__ = ("_deadlines", "_monotonic", "_replica")

    def __init__(self, replica: Replica, monotonic: Callable[[], float], deadlines: Deadlines) -> None:
        self._replica, self._monotonic, self._deadlines = replica, monotonic, deadlines

    def __enter__(self) -> None:
        self._replica.in_flight += 1

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._replica.in_flight -= 1
        breaker, now = self._replica.breaker, self._monotonic()
        if error is None or isinstance(error, BackendRefused | BackendErred):  # then it answers; the request or the model was at fault
            breaker.succeeded(now)
            return
        failed = _failure(error, self._deadlines)
        if failed is None:
            breaker.left()
            return
        self._replica.last_error = str(failed)
        if failed.asked is None:
            breaker.failed(now)
        else:
            breaker.rest(now, failed.asked)
        if failed is not error:
            raise failed from error


def _failure(error: BaseException, deadlines: Deadlines) -> Failed | None:
    """What an exception tells of the replica; None for one that tells nothing, such as a client that went away."""
    match error:
        case Failed():
            return error
        case NoConnection(slow=True):
            return Failed(f"no connection within {deadlines.connect:g} s", again=True, sent=False)
        case NoConnection():
            return Failed("it cannot be reached", again=True, sent=False)
        case TimeoutError():
            return Failed("it took too long", again=False)
        case BodyTooLong():
            return Failed(str(error), again=False)
        case OSError() | ValueError():
            return Failed(type(error).__name__, again=True)
        case _:
            return None


class EventParser:
    """The data of server-sent events, from bytes cut anywhere (httpx-sse wants whole lines of text, aiohttp-sse-client a session of its
    own). Raises ValueError for an event that grows beyond bounds."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > MOST_BYTES:
            raise ValueError("an event without end")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data = []
        return found


def _seconds(retry_after: str | None) -> float:
    """What a `retry-after` asks for; a second when it says nothing we understand (a date is rare and means long)."""
    try:
        return max(0.0, float(retry_after or 1))
    except ValueError:
        return 1.0


def _plain(url: yarl.URL) -> str:
    """Without credentials and query."""
    return str(url.with_user(None).with_query(None))
