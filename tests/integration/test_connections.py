"""Connections to a server on real sockets: kept, shared, bounded, and never used when in doubt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import yarl

from tutelage.fleet import connections
from tutelage.fleet.connections import BodyTooLong, Connections, NoConnection

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@asynccontextmanager
async def serving(handle: Handle, *, most: int = 10, connect_seconds: float = 2.0) -> AsyncIterator[Connections]:
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = yarl.URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions")
    made = Connections(url, headers={"x-key": "k"}, most=most, connect_seconds=connect_seconds)
    try:
        yield made
    finally:
        made.close()
        server.close()


def replying(reply: bytes, calls: list[tuple[str, bytes]], *, delay: float = 0.0) -> Handle:
    """A server that gives every request on a connection the same reply; `calls` gets the peer and the request's head."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _head(reader):
            calls.append((str(writer.get_extra_info("peername")), head))
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            await asyncio.sleep(delay)
            writer.write(reply)

    return handle


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


async def said(connections: Connections, most: int = 1000) -> bytes:
    async with await connections.post(b"{}") as response:
        return await response.read(most)


async def test_calls_one_after_the_other_share_a_connection() -> None:
    calls: list[tuple[str, bytes]] = []
    async with serving(replying(OK, calls)) as made:
        assert [await said(made) for _ in range(5)] == [b"ok"] * 5
    assert len({peer for peer, _ in calls}) == 1
    assert b"x-key: k\r\n" in calls[0][1]


async def test_no_more_than_agreed_are_open_at_once_and_who_waits_too_long_is_told() -> None:
    calls: list[tuple[str, bytes]] = []
    async with serving(replying(OK, calls, delay=0.1), most=2, connect_seconds=5) as made:
        assert await asyncio.gather(*(said(made) for _ in range(8))) == [b"ok"] * 8
    assert len({peer for peer, _ in calls}) == 2
    async with serving(replying(OK, calls, delay=0.5), most=1, connect_seconds=0.05) as made:
        first = asyncio.create_task(said(made))
        await asyncio.sleep(0.02)
        with pytest.raises(NoConnection, match="in use"):
            await said(made)
        assert await first == b"ok"


async def test_an_interim_reply_is_not_the_reply() -> None:
    async with serving(replying(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK, [])) as made:
        assert await said(made) == b"ok"


async def test_chunks_are_read_to_their_end_and_the_connection_is_used_again() -> None:
    calls: list[tuple[str, bytes]] = []
    reply = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    async with serving(replying(reply, calls)) as made:
        assert [await said(made), await said(made)] == [b"abcde"] * 2
    assert len({peer for peer, _ in calls}) == 1


async def test_a_reply_that_stops_short_is_an_error_and_never_a_short_reply() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this")
        writer.close()

    async with serving(handle) as made:
        with pytest.raises(ConnectionError):
            await said(made)


async def test_a_connection_on_which_more_was_said_than_asked_is_not_used_again() -> None:
    calls: list[tuple[str, bytes]] = []
    async with serving(replying(OK + OK, calls)) as made:
        assert await said(made) == b"ok"
        await asyncio.sleep(0.05)
        assert await said(made) == b"ok"
    assert len({peer for peer, _ in calls}) == 2


async def test_a_call_that_is_left_closes_its_connection() -> None:
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _head(reader)
        await reader.readexactly(2)
        if not await reader.read():
            closed.set()

    async with serving(handle) as made:
        call = asyncio.create_task(said(made))
        await asyncio.sleep(0.05)
        call.cancel()
        assert await asyncio.wait_for(closed.wait(), 2)


async def test_a_connection_that_was_idle_for_long_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bytes]] = []
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.05)
    async with serving(replying(OK, calls)) as made:
        await said(made)
        await asyncio.sleep(0.1)
        await said(made)
    assert len({peer for peer, _ in calls}) == 2


async def test_a_long_body_waits_at_the_server_and_one_that_is_too_long_is_refused() -> None:
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await _head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 64000000\r\n\r\n")
        for _ in range(1000):
            writer.write(b"x" * 64_000)
            await writer.drain()
            sent += 64_000

    async with serving(handle) as made:
        async with await made.post(b"{}") as response:
            await asyncio.sleep(0.3)
            assert sent < 32_000_000  # nobody has taken any of it
            assert len(await response.read(64_000_000)) == 64_000_000
        with pytest.raises(BodyTooLong):
            await said(made, most=1_000_000)


async def test_a_head_without_end_is_refused() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + b"x-more: 0123456789\r\n" * 10_000)

    async with serving(handle) as made:
        with pytest.raises(ValueError, match="head"):
            await said(made)
