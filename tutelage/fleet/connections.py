"""HTTP/1.1 to one server: connections that stay open, one call at a time on each, a call's reply whole or piece by piece.

The wire is parsed by llhttp (httptools). It refuses to know what is asked, how long that may take and whether to try again.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, cast

import httptools
import yarl

MOST_HEAD_BYTES = 64 * 1024
PAUSE_BYTES = 1024 * 1024  # that nobody has taken: the server is told to wait
IDLE_SECONDS = 15.0  # servers close idle connections too; one that is about to be closed must not be used


class NoConnection(ConnectionError):
    """The server could not be reached; nothing was sent. `slow`: there was no connection in time."""

    def __init__(self, told: str, *, slow: bool = False) -> None:
        super().__init__(told)
        self.slow = slow


class BodyTooLong(ValueError):
    """A reply has more bytes than were asked for."""


class Connection(asyncio.Protocol):
    """One connection and the reply that is arriving on it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.headers: dict[bytes, bytes] = {}
        self.status, self.headed, self.complete, self.idle_since = 0, False, True, 0.0
        self._pieces: deque[bytes] = deque()
        self._unread = self._head_bytes = 0
        self._framed = self._keep = True
        self._failed: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._parser: Any = None

    def send(self, request: bytes) -> None:
        self.headers, self._pieces = {}, deque()
        self.status, self.headed, self.complete, self._unread, self._head_bytes = 0, False, False, 0, 0
        self._parser = httptools.HttpResponseParser(self)
        assert self.transport is not None
        self.transport.write(request)

    async def arrives(self) -> None:
        """Wait until more of the reply is here. Raises ConnectionError, ValueError."""
        if self._failed is not None:
            raise self._failed
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def take(self) -> bytes:
        """What has arrived of the body and was not taken yet."""
        taken = b"".join(self._pieces)
        self._pieces.clear()
        if self._unread > PAUSE_BYTES and self.transport is not None:
            self.transport.resume_reading()
        self._unread = 0
        return taken

    @property
    def reusable(self) -> bool:
        return self.complete and self._failed is None and self._framed and self._keep

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    @property
    def closed(self) -> bool:
        return self._failed is not None or self.transport is None or self.transport.is_closing()

    # --- what asyncio tells ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by type

    def data_received(self, data: bytes) -> None:
        if self.complete:
            self._fail(ConnectionError("it spoke without being asked"))
            return
        if not self.headed:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as broken:
            self._fail(ValueError(f"its reply is not HTTP: {broken}"))
            return
        if not self.headed and self._head_bytes > MOST_HEAD_BYTES:
            self._fail(ValueError(f"the head of its reply has more than {MOST_HEAD_BYTES} bytes"))
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.headed and not self._framed and exc is None:
            self.complete = True  # a body without a length ends with its connection
        elif self._failed is None:
            self._failed = exc or ConnectionResetError("it closed the connection before its reply was whole")
        self._wake()

    # --- what llhttp tells ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:  # more than was asked for
            self._keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.complete:
            self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self.complete:
            return
        self.status = self._parser.get_status_code()
        self.headed = self.status >= 200
        known = self.headers.keys()
        self._framed = b"content-length" in known or b"transfer-encoding" in known or self.status in (204, 304)

    def on_body(self, body: bytes) -> None:
        if self.complete:
            return
        self._pieces.append(body)
        self._unread += len(body)
        if self._unread > PAUSE_BYTES and self.transport is not None:
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        if self.headed:
            self.complete = True
            self._keep = self._keep and self._parser.should_keep_alive()
        else:  # an interim reply (1xx): the real one follows
            self.headers = {}

    def _fail(self, failed: Exception) -> None:
        self._failed = self._failed or failed
        self.close()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is None or self._waiter.done():
            return
        if self._failed is not None and not self.complete:
            self._waiter.set_exception(self._failed)
        else:
            self._waiter.set_result(None)


class Response:
    """A reply whose head is here. Leaving its context gives the connection back, or closes it when the reply was not read to its end."""

    def __init__(self, connection: Connection, owner: Connections) -> None:
        self._connection, self._owner = connection, owner
        self.status = connection.status

    def header(self, name: str) -> str | None:
        value = self._connection.headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    async def read(self, most: int) -> bytes:
        """The whole body. Raises BodyTooLong as soon as it has more than `most` bytes, ConnectionError, ValueError."""
        if not self._connection.complete:
            return b"".join([piece async for piece in self.pieces(most)])
        body = self._connection.take()
        if len(body) > most:
            raise BodyTooLong(f"its reply has more than {most} bytes")
        return body

    async def pieces(self, most: int) -> AsyncGenerator[bytes, None]:
        """The body as it arrives. Raises as `read`."""
        size = 0
        while True:
            if piece := self._connection.take():
                size += len(piece)
                if size > most:
                    raise BodyTooLong(f"its reply has more than {most} bytes")
                yield piece
            elif self._connection.complete:
                return
            else:
                await self._connection.arrives()

    async def __aenter__(self) -> Response:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._owner.give_back(self._connection)


class Connections:
    """Those to one URL: `most` at once, each idle one closed after a while. `headers` go with every call."""

    def __init__(self, url: yarl.URL, *, headers: Mapping[str, str], most: int, connect_seconds: float) -> None:
        self._url = url
        self._connect = connect_seconds
        self._free: deque[Connection] = deque()
        self._places = asyncio.Semaphore(most)
        self._most = most
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        told = {"host": url.authority.rpartition("@")[2], **headers}
        if url.user is not None:
            told.setdefault("authorization", "Basic " + base64.b64encode(f"{url.user}:{url.password or ''}".encode()).decode())
        lines = [f"POST {url.raw_path_qs} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items()), "content-length: "]
        self._head = "\r\n".join(lines).encode("latin-1")

    async def post(self, body: bytes) -> Response:
        """The reply, once its head is here; use it as a context.

        Raises:
            NoConnection: the server could not be reached; nothing was sent.
            ConnectionError, ValueError: it hung up, or does not speak HTTP.
        """
        connection = await self._connection()
        try:
            connection.send(b"%s%d\r\n\r\n%s" % (self._head, len(body), body))
            while not connection.headed:
                await connection.arrives()
        except BaseException:
            self.give_back(connection)
            raise
        return Response(connection, self)

    def give_back(self, connection: Connection) -> None:
        self._places.release()
        if connection.reusable and not connection.closed:
            connection.idle_since = asyncio.get_running_loop().time()
            self._free.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        while self._free:
            self._free.pop().close()

    async def _connection(self) -> Connection:
        """The one that was used last, so that those not needed any more grow old and are closed; else a new one."""
        if self._places.locked():
            try:
                async with asyncio.timeout(self._connect):
                    await self._places.acquire()
            except TimeoutError:
                raise NoConnection(f"all {self._most} connections are in use", slow=True) from None
        else:
            await self._places.acquire()
        since = asyncio.get_running_loop().time() - IDLE_SECONDS
        while self._free and (self._free[0].closed or self._free[0].idle_since < since):
            self._free.popleft().close()
        while self._free:
            connection = self._free.pop()
            if not connection.closed:
                return connection
        try:
            return await self._opened()
        except BaseException:
            self._places.release()
            raise

    async def _opened(self) -> Connection:
        host, port = self._url.host, self._url.port
        assert host is not None
        assert port is not None  # http and https have one by default
        try:
            async with asyncio.timeout(self._connect):
                _, connection = await asyncio.get_running_loop().create_connection(Connection, host, port, ssl=self._tls)
        except TimeoutError:
            raise NoConnection("no connection in time", slow=True) from None
        except OSError as failed:  # refused, unknown host, a certificate that does not hold
            raise NoConnection(str(failed)) from failed
        return connection
