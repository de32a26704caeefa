"""A model that costs nothing: answers chat completions with the same few words, at once or after a delay, and counts who asked.

Header and body leave in one write with TCP_NODELAY: two writes would add 40 ms of delayed acknowledgement to every keep-alive client
and measure the mock instead of the gateway. It refuses to know what is measured.

`/d150/v1/…` answers after 150 ms. Started with --record, each answer names its call (`call-17`), a prompt that holds `marker-…` is counted
by that name (GET /record tells), and one that holds `chunks-9000` is streamed in so many, at `/p50/v1/…` one every 50 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
from collections import Counter
from typing import Any

import httptools
import orjson
import uvloop

USAGE = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
CHUNKS = 30
MARKER = re.compile(rb"marker-[\w.-]+")
LENGTH = re.compile(rb"chunks-(\d+)")
PATH = re.compile(rb"^(?:/d(\d+))?(?:/p(\d+))?(/.*)$")


def _http(body: bytes, kind: bytes = b"application/json", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (status, kind, len(body), body)


def _answer(said: str = "forty two") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop", "logprobs": None}
    body = {"id": "mock", "object": "chat.completion", "created": 1, "model": "mock", "choices": [choice], "usage": USAGE}
    return _http(orjson.dumps(body))


def _stream(said: str = "word ", chunks: int = CHUNKS) -> list[bytes]:
    """The head and each event, in HTTP chunks."""
    base = {"id": "mock", "object": "chat.completion.chunk", "created": 1, "model": "mock"}
    events = [base | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": said}, "finish_reason": None}]}] * chunks
    events += [base | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, base | {"choices": [], "usage": USAGE}]
    written = [b"data: " + orjson.dumps(event) + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%s\r\n" % (len(event), event) for event in written), b"0\r\n\r\n"]


ANSWER, STREAM = _answer(), _stream()
MODELS = _http(orjson.dumps({"object": "list", "data": [{"id": "mock", "object": "model", "created": 1, "owned_by": "mock"}]}))


class Mock(asyncio.Protocol):
    """One connection. `record` is shared by all, `counts` too."""

    def __init__(self, counts: Counter[str], record: Counter[str] | None) -> None:
        self._counts, self._record = counts, record
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._url, self._body = b"", b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        found = PATH.match(self._url)
        delay, pause, path = (int(found[1] or 0), int(found[2] or 0), found[3]) if found else (0, 0, b"")
        if not path.endswith(b"/chat/completions"):
            self._transport.write(self._other(path))
            return
        self._counts["calls"] += 1
        answer, stream = ANSWER, STREAM
        streamed = b'"stream":true' in self._body.replace(b" ", b"")
        if self._record is not None:
            if marker := MARKER.search(self._body):
                self._record[marker[0].decode()] += 1
            said, length = f"call-{self._counts['calls']} ", LENGTH.search(self._body)
            if streamed:
                stream = _stream(said, int(length[1]) if length else CHUNKS)
            else:
                answer = _answer(said)
        write = (lambda: self._write_stream(stream, pause / 1000)) if streamed else (lambda: self._transport.write(answer))
        if delay:
            asyncio.get_running_loop().call_later(delay / 1000, write)
        else:
            write()

    def _write_stream(self, stream: list[bytes], pause: float) -> None:
        self._transport.write(stream[0] + stream[1])
        loop = asyncio.get_running_loop()

        def rest(number: int) -> None:
            if number < len(stream) and not self._transport.is_closing():
                self._transport.write(stream[number])
                loop.call_later(pause, rest, number + 1)

        loop.call_later(pause, rest, 2)

    def _other(self, path: bytes) -> bytes:
        if path == b"/record":
            return _http(orjson.dumps({"calls": self._counts["calls"], "markers": dict(self._record or {})}))
        return MODELS if path.endswith(b"/models") else _http(b"{}")


async def serve(port: int, *, record: bool) -> None:
    counts: Counter[str] = Counter()
    recorded: Counter[str] | None = Counter() if record else None
    server = await asyncio.get_running_loop().create_server(lambda: Mock(counts, recorded), "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.port, record=arguments.record))
