"""Load on one URL: so many connections in a closed loop, or so many requests a second whatever comes back. Prints one JSON object.

wrk and k6 are no Python packages, and locust spends a millisecond a request; this spends 40 µs. In the open loop a request's latency
counts from when it should have been sent, so a server that stalls cannot hide its queue. It refuses to know what it loads.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httptools
import numpy as np
import orjson
import uvloop

DIGITS = 12


class Client(asyncio.Protocol):
    """One keep-alive connection: sends a request, waits for its whole response, tells `done(status, seconds, first seconds)`."""

    def __init__(self, done: Callable[[Client, int, float, float], None]) -> None:
        self._done = done
        self._parser: Any = None
        self._transport: asyncio.Transport | None = None
        self._sent = self._first = 0.0
        self.open = self._waiting = False

    def connection_made(self, transport: Any) -> None:
        self._transport, self.open = transport, True
        self._parser = httptools.HttpResponseParser(self)

    def send(self, request: bytes, since: float) -> None:
        assert self._transport is not None
        self._sent, self._first, self._waiting = since, 0.0, True
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if not self._first:
            self._first = time.perf_counter()

    def on_message_complete(self) -> None:
        now, self._waiting = time.perf_counter(), False
        status, self._parser = self._parser.get_status_code(), httptools.HttpResponseParser(self)
        self._done(self, status, now - self._sent, (self._first or now) - self._sent)

    def connection_lost(self, _: Exception | None) -> None:
        waited, self.open = self.open and self._waiting, False
        if waited:
            self._done(self, 0, 0.0, 0.0)

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.close()


class Load:
    """Requests to one URL and what came of them."""

    def __init__(self, url: str, headers: dict[str, str], body: dict[str, Any], *, unique: bool) -> None:
        self._parts = urlsplit(url)
        content = orjson.dumps(body)
        marker = b"#" * DIGITS
        assert not unique or marker in content
        head = [f"POST {self._parts.path} HTTP/1.1", f"host: {self._parts.netloc}", "content-type: application/json"]
        head += [f"{name}: {value}" for name, value in headers.items()] + [f"content-length: {len(content)}", "", ""]
        before, _, after = ("\r\n".join(head).encode() + content).partition(marker)
        self._request: Callable[[int], bytes] = (
            (lambda n: b"%s%012d%s" % (before, n, after)) if unique else (lambda _: before + (marker + after if after else b""))
        )
        self._numbers = itertools.count(time.time_ns() % 10**9 * 1000)
        self.latencies: list[float] = []
        self.firsts: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.counting = False

    async def connect(self, count: int, done: Callable[[Client, int, float, float], None]) -> list[Client]:
        loop = asyncio.get_running_loop()
        host, port = self._parts.hostname, self._parts.port
        assert host is not None
        assert port is not None
        made = [await loop.create_connection(lambda: Client(done), host, port) for _ in range(count)]
        return [client for _, client in made]

    async def closed(self, connections: int, seconds: float, warm: float) -> float:
        """A closed loop; the seconds that were counted."""
        stop = False

        def done(client: Client, status: int, took: float, first: float) -> None:
            self._count(status, took, first)
            if not stop and client.open:
                client.send(self._request(next(self._numbers)), time.perf_counter())

        clients = await self.connect(connections, done)
        for client in clients:
            client.send(self._request(next(self._numbers)), time.perf_counter())
        await asyncio.sleep(warm)
        self.counting, started = True, time.perf_counter()
        await asyncio.sleep(seconds)
        self.counting, stop = False, True
        took = time.perf_counter() - started
        await asyncio.sleep(0.3)
        for client in clients:
            client.close()
        return took

    async def open(self, rate: float, seconds: float) -> float:
        """An open loop at `rate` requests a second."""
        free: list[Client] = []
        waiting: list[tuple[bytes, float]] = []

        def done(client: Client, status: int, took: float, first: float) -> None:
            self._count(status, took, first)
            if client.open and waiting:
                client.send(*waiting.pop(0))
            elif client.open:
                free.append(client)

        free += await self.connect(200, done)
        clients = list(free)
        self.counting, started = True, time.perf_counter()
        total = int(rate * seconds)
        for number in range(total):
            due = started + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            request = self._request(next(self._numbers))
            while free and not free[-1].open:  # the server closes what is idle for long
                free.pop()
            if free:
                free.pop().send(request, due)
            else:
                waiting.append((request, due))
        deadline = time.perf_counter() + 30
        while sum(self.statuses.values()) < total and time.perf_counter() < deadline:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)
        took = time.perf_counter() - started
        self.statuses[-1] += total - sum(self.statuses.values())  # never answered
        for client in clients:
            client.close()
        return took

    def _count(self, status: int, took: float, first: float) -> None:
        if self.counting:
            self.statuses[status] += 1
            if status == 200:
                self.latencies.append(took)
                self.firsts.append(first)

    def result(self, took: float) -> dict[str, Any]:
        def told(values: list[float]) -> dict[str, float]:
            found = np.percentile(values, [50, 95, 99]) * 1000 if values else [float("nan")] * 3
            return dict(zip(("p50_ms", "p95_ms", "p99_ms"), map(float, found), strict=True))

        errors = {str(status): n for status, n in self.statuses.items() if status != 200 and n}
        return {
            "n": len(self.latencies),
            "rps": len(self.latencies) / took,
            "errors": errors,
            **told(self.latencies),
            "first": told(self.firsts),
        }


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    load = Load(arguments.url, json.loads(arguments.headers), json.loads(arguments.body), unique=arguments.unique)
    if arguments.rate:
        return load.result(await load.open(arguments.rate, arguments.seconds))
    return load.result(await load.closed(arguments.connections, arguments.seconds, arguments.warm))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url")
    parser.add_argument("--headers", default="{}", help="JSON")
    parser.add_argument("--body", required=True, help=f"JSON; {'#' * DIGITS} in it becomes another number in each request with --unique")
    parser.add_argument("--unique", action="store_true")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--warm", type=float, default=1)
    parser.add_argument("--rate", type=float, default=0, help="open loop at this many requests a second")
    print(json.dumps(uvloop.run(run(parser.parse_args()))))
