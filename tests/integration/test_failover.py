"""Models that fail on real sockets: hung, dead, flooded, rate-limited, garbled and cut off in mid-stream. Nothing else may suffer."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeModelServer

from tutelage.errors import BackendFailed, BackendRefused
from tutelage.fleet.backends import OpenAIBackend, refused
from tutelage.fleet.endpoint import Deadlines, Endpoint, EventParser

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "2 + 2?"}]}
OK = b'{"choices": [{"message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}]}'


@asynccontextmanager
async def backend(*urls: str, **deadlines: float) -> AsyncIterator[OpenAIBackend]:
    endpoint = Endpoint(
        "big", urls, headers={}, deadlines=Deadlines(**deadlines), connections=2000, refusal=partial(refused, "big"), chance=lambda: 0.5
    )
    made = OpenAIBackend("big", endpoint, model="m", price=None, count_tokens=len)
    try:
        yield made
    finally:
        await made.close()


Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw(reply: bytes | None, *, piece: int | None = None) -> AsyncIterator[str]:
    """A server that reads a request and says `reply` in pieces of so many bytes, then hangs up; None: it never says anything."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if reply is None:
            await asyncio.sleep(60)
            return
        size = piece or len(reply)
        for start in range(0, len(reply), size):
            writer.write(reply[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()


def http(body: bytes, *, kind: str = "application/json", status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n{more}connection: close\r\n\r\n".encode() + body


async def heard(model: OpenAIBackend) -> str:
    return "".join([c["choices"][0]["delta"].get("content") or "" async for c in model.stream(ASK) if c.get("choices")])


async def test_a_hung_replica_without_a_timeout_of_its_own_stalls_nobody_else() -> None:
    """vLLM production-stack #749: one backend that hung blocked every request."""
    with FakeModelServer("4") as healthy:
        async with raw(None) as hung, backend(hung, total=2.0) as stuck, backend(f"{healthy.url}/v1") as fine:
            waiting = [asyncio.create_task(stuck.complete(ASK)) for _ in range(50)]
            answers = await asyncio.wait_for(asyncio.gather(*(fine.complete(ASK) for _ in range(20))), 1.5)
            failed = await asyncio.gather(*waiting, return_exceptions=True)
    assert [answer.text for answer in answers] == ["4"] * 20
    assert all(isinstance(one, BackendFailed) for one in failed)


async def test_a_dead_replica_is_not_called_any_more() -> None:
    """vLLM production-stack #420: requests still went to nodes that were gone."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with FakeModelServer("4") as healthy:
            async with backend(dead, f"{healthy.url}/v1") as model:
                model._endpoint._chance = iter([n / 97 % 1 for n in range(100_000)]).__next__
                for _ in range(40):
                    await model.complete(ASK)
                before = model.health()[0]
                for _ in range(40):
                    await model.complete(ASK)
                after = model.health()[0]
    assert (before.state, before.failures) == ("open", 5)
    assert after.failures == 5
    assert len(healthy.requests) == 80


async def test_many_calls_at_once_are_all_answered() -> None:
    """vLLM production-stack #448: the router crashed at a thousand concurrent requests."""
    with FakeModelServer("4") as server:
        server.delay = 0.2
        async with backend(f"{server.url}/v1") as model:
            answers = await asyncio.gather(*(model.complete(ASK) for _ in range(1500)))
            assert model.health()[0].in_flight == 0
    assert [answer.text for answer in answers] == ["4"] * 1500


async def test_a_replica_that_was_stopped_in_its_tracks_is_left_alone_after_a_few_calls(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(
        "import asyncio\n"
        f"REPLY = {http(OK)!r}\n"
        "async def handle(r, w):\n    await r.readuntil(b'\\r\\n\\r\\n')\n    w.write(REPLY)\n    await w.drain()\n    w.close()\n"
        "async def main():\n    s = await asyncio.start_server(handle, '127.0.0.1', 0)\n"
        "    print(s.sockets[0].getsockname()[1], flush=True)\n    await s.serve_forever()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, str(script), stdout=subprocess.PIPE)
    with FakeModelServer("4") as healthy:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{(await process.stdout.readline()).decode().strip()}/v1"
        try:
            async with backend(url, f"{healthy.url}/v1", total=0.3) as model:
                process.send_signal(signal.SIGSTOP)
                told = await asyncio.gather(*(model.complete(ASK) for _ in range(30)), return_exceptions=True)
                later = [(await model.complete(ASK)).text for _ in range(20)]
        finally:
            process.kill()
            await process.wait()
    assert later == ["4"] * 20
    assert sum(isinstance(one, BackendFailed) for one in told) <= 30


async def test_a_failing_model_is_tried_again_within_the_budget_and_not_in_a_storm() -> None:
    with FakeModelServer("4") as server:
        server.status = 503
        async with backend(f"{server.url}/v1") as model:
            told = await asyncio.gather(*(model.complete(ASK) for _ in range(100)), return_exceptions=True)
            assert all(isinstance(one, BackendFailed) for one in told)
            assert model.health()[0].state == "open"
            with pytest.raises(BackendFailed, match="left alone") as alone:
                await model.complete(ASK)
    assert len(server.requests) <= 120
    assert alone.value.retry_after is not None


async def test_a_rate_limited_replica_rests_as_long_as_it_asks_and_another_one_answers() -> None:
    limited = http(b"{}", status="429 Too Many Requests", more="retry-after: 30\r\n")
    with FakeModelServer("4") as healthy:
        async with raw(limited) as url, backend(url, f"{healthy.url}/v1") as model:
            model._endpoint._chance = iter([n / 97 % 1 for n in range(10_000)]).__next__
            assert [(await model.complete(ASK)).text for _ in range(10)] == ["4"] * 10
            states = [replica.state for replica in model.health()]
            assert model.health()[0].failures == 0
    assert states == ["resting", "closed"]


async def test_a_request_that_nobody_would_answer_is_refused_and_does_not_count_against_the_model() -> None:
    with FakeModelServer("4") as server:
        server.status = 422
        async with backend(f"{server.url}/v1") as model:
            for _ in range(8):
                with pytest.raises(BackendRefused, match="fake failure 422"):
                    await model.complete(ASK)
            assert (model.health()[0].state, len(server.requests)) == ("closed", 8)


@pytest.mark.parametrize(
    "reply",
    [
        http(b"not json"), http(b"[]"), http(b"{}"), http(b'{"choices": []}'), http(b'{"choices": [{"message": null}]}'),
        http(b'{"choices": [{"message": {"content": 7}}]}'), http(b'{"choices": [{"message": {"content": "\xff"}}]}'),
        http(b'{"choices": [{"message": {"content": "4"}}], "usage": {"prompt_tokens": -1}}'),
        http(b'{"choices": [{"message": {"content": "4"}, "logprobs": {"content": [{"logprob": NaN}]}}]}'),
        http(b"x", more="content-length: 100\r\n"), b"", b"garbage\r\n\r\n", http(b"", status="302 Found", more="location: http://127.0.0.1:1/\r\n"),
    ],
)  # fmt: skip
async def test_whatever_a_model_says_instead_of_an_answer_is_a_failure_of_that_model(reply: bytes) -> None:
    async with raw(reply) as url, backend(url, total=3.0) as model:
        with pytest.raises(BackendFailed, match="model big"):
            await model.complete(ASK)


async def test_an_endless_reply_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tutelage.fleet.endpoint.MOST_BYTES", 100_000)
    async with raw(http(b'{"choices": "' + b"x" * 1_000_000)) as url, backend(url) as model:
        with pytest.raises(BackendFailed, match="more than 100000 bytes"):
            await model.complete(ASK)
    async with raw(http(b"data: " + b"x" * 1_000_000, kind="text/event-stream")) as url, backend(url) as model:
        with pytest.raises(BackendFailed):
            await heard(model)


EVENTS = (
    b': a comment\r\n\r\nevent: message\r\ndata: {"choices": [{"index": 0, "delta": {"content": "f\xc3\xbc"}}]}\r\n\r\n'
    b'data: {"choices":\ndata: [{"index": 0, "delta": {"content": "nf"}}]}\n\ndata:{"choices": []}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
async def test_events_may_be_cut_anywhere(piece: int) -> None:
    async with raw(http(EVENTS, kind="text/event-stream"), piece=piece) as url, backend(url) as model:
        assert await heard(model) == "fünf"


def test_the_parser_gives_each_event_once_however_it_is_cut() -> None:
    whole = EventParser().feed(EVENTS)
    bytewise = EventParser()
    assert [data for byte in EVENTS for data in bytewise.feed(bytes([byte]))] == whole
    assert len(whole) == 4


async def test_until_its_first_word_another_replica_may_take_over_a_stream() -> None:
    with FakeModelServer("forty-two") as healthy:
        async with raw(http(b"", kind="text/event-stream")) as cut, backend(cut, f"{healthy.url}/v1") as model:
            model._endpoint._chance = lambda: 0.0
            assert await heard(model) == "forty-two"


@pytest.mark.parametrize("tail", [b"", b"data: {not json\n\n", b'data: {"error": {"message": "x"}}\n\n', b'data: {"choices": 3}\n\n'])
async def test_a_stream_that_breaks_after_its_first_word_fails_and_never_ends_cleanly(tail: bytes) -> None:
    begun = b'data: {"choices": [{"index": 0, "delta": {"content": "f"}}]}\n\n'
    async with raw(http(begun + tail, kind="text/event-stream")) as url, backend(url, total=3.0) as model:
        with pytest.raises(BackendFailed):
            await heard(model)


async def test_a_stream_that_goes_quiet_is_given_up_at_its_deadline() -> None:
    with FakeModelServer("forty-two") as server:
        server.delay = 1.0
        async with backend(f"{server.url}/v1", first_token=0.3) as slow_to_begin, backend(f"{server.url}/v1", idle=0.3) as slow_to_go_on:
            for model in (slow_to_begin, slow_to_go_on):
                started = time.monotonic()
                with pytest.raises(BackendFailed):
                    await heard(model)
                assert time.monotonic() - started < 5
                assert model.health()[0].failures >= 1


async def test_a_caller_that_goes_away_is_no_failure_of_the_model() -> None:
    async with raw(None) as hung, backend(hung) as model:
        for _ in range(10):
            task = asyncio.create_task(model.complete(ASK))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        (replica,) = model.health()
    assert (replica.state, replica.in_flight) == ("closed", 0)
