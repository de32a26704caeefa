"""What no well-behaved client sends, byte by byte on a real socket: each is answered or cut off at once, and never with a 5xx."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

import httptools
import numpy as np
import pytest

from benchmarks.replicas import Party, Replica, Site, enroll
from tutelage.stores.database import open_pool

pytestmark = pytest.mark.slow
CHAT, FEEDBACK, EMBED = "/v1/chat/completions", "/v1/feedback", "/v1/embeddings"
SOON, SLOW = 1.0, 10.0  # seconds within which a request is answered, and a client that dawdles is cut off
MOST_GROWTH = 100_000_000


class Heard:
    """Statuses of the responses on one connection, and how it ended: "open", "closed", or "silent" when nothing came in time."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.ended, self.seconds = "open", 0.0
        self.parser = httptools.HttpResponseParser(self)

    def on_message_complete(self) -> None:
        self.statuses.append(self.parser.get_status_code())


async def say(url: str, pieces: Iterable[bytes], *, responses: int = 1, pause: float = 0.0, most: float = 5.0) -> Heard:
    """Send `pieces`, `pause` seconds apart, until so many responses have come, the server hangs up or `most` seconds are over."""
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    heard, began = Heard(), time.monotonic()

    async def send() -> None:
        with suppress(OSError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(most):
            while len(heard.statuses) < responses:
                if not (data := await reader.read(65536)):
                    heard.ended = "closed"
                    break
                heard.parser.feed_data(data)
    except TimeoutError:
        heard.ended = "silent"
    except OSError:
        heard.ended = "closed"
    heard.seconds = time.monotonic() - began
    sending.cancel()
    writer.close()
    return heard


def request(
    body: bytes = b"", *headers: bytes, key: str | None = None, path: str | bytes = CHAT, method: str = "POST", length: bool = True
) -> bytes:
    head = [b"%s %s HTTP/1.1" % (method.encode(), path if isinstance(path, bytes) else path.encode()), b"host: gateway"]
    head += [b"authorization: Bearer " + key.encode()] if key else []
    head += [b"content-length: %d" % len(body)] if length else []
    return b"\r\n".join([*head, *headers, b"", body])


def chat(more: bytes = b"", content: bytes = b'"x"') -> bytes:
    return b'{"model":"mock","messages":[{"role":"user","content":%s}]%s}' % (content, more)


def deep(depth: int, opens: bytes = b"[", closes: bytes = b"]") -> bytes:
    return opens * depth + (b"1" if b"{" in opens else b"") + closes * depth


def bodies() -> dict[str, tuple[bytes, int]]:
    """Bodies of a chat request, and the status each gets."""
    nested = {
        f"{depth} deep in {name}": (chat(b',"x":' + deep(depth, *kinds)), 200 if depth < 190 else 400)
        for depth in (100, 189, 200, 254, 300, 1000, 100_000)
        for name, kinds in (("arrays", ()), ("objects", (b'{"a":', b"}")))
    }
    refused = {
        "invalid UTF-8": chat(content=b'"\xff\xfe"'),
        "a surrogate in bytes": chat(content=b'"\xed\xa0\x80"'),
        "a lone surrogate": chat(content=b'"\\ud800"'),
        "a lone surrogate as a name": chat(b',"\\udfff":1'),
        "nothing": b"",
        "a BOM": b"\xef\xbb\xbf" + chat(),
        "unclosed": b"[" * 100_000,
        "null": b"null",
        "a number": b"1",
        "a string": b'"x"',
        "half": chat()[:-9],
        "NUL": b"\0" * 100,
        "NaN": chat(b',"temperature":NaN'),
        "Infinity": chat(b',"temperature":-Infinity'),
        "NaN where nobody looks": chat(b',"x":NaN'),
        "1e999": chat(b',"x":1e999'),
        "5,000 digits": chat(b',"x":' + b"9" * 5000),
        "20 digits": chat(b',"max_tokens":' + b"9" * 20),
        "19 digits": chat(b',"max_tokens":' + b"9" * 19),
        "a bool for a number": chat(b',"max_tokens":true'),
        "text for a number": chat(b',"n":"2"'),
        "100,000 messages": chat().replace(b"}]", b"}" + b',{"role":"user","content":"x"}' * 100_000 + b"]"),
        "the last of two keys counts": chat(b',"messages":[]'),
        "a multipart form": b"--x\r\n\r\n--x--",
        "gzip": b"\x1f\x8b\x08\x00\x00",
    }
    taken = {
        "NUL in text": chat(content=b'"a\\u0000b"'),
        "minus zero": chat(b',"temperature":-0.0'),
        "duplicate keys": b'{"model":"nobody",' + chat()[1:],
        "100,000 keys": chat(b"," + b",".join(b'"k%d":1' % n for n in range(100_000))),
        "right to left": chat(content='"\u202eabc\ufeff"'.encode()),
        "a line break in a domain": chat(b',"metadata":{"domain":"a\\r\\nx-evil: 1\\u0000"}'),
        "3 megabytes": chat(content=b'"%s"' % (b"word " * 600_000)),
    }
    return nested | {name: (body, 400) for name, body in refused.items()} | {name: (body, 200) for name, body in taken.items()}


def requests(party: Party) -> dict[str, tuple[bytes, tuple[int, ...]]]:
    """Whole requests, and the statuses each may get; without any the server may only hang up."""
    key, ok, no_length = party.key, chat(), {"key": party.key, "length": False}
    wrong = (400, 404, 413, 414, 431)
    framing = {
        "1 GB declared": (request(b"x", b"content-length: 1073741824", **no_length), (413,)),
        "1 GB declared, expecting to go on": (request(b"", b"content-length: 1073741824", b"expect: 100-continue", **no_length), (413,)),
        "6 MB in chunks": (
            request(b"10000\r\n%s\r\n" % (b"x" * 65536) * 100 + b"0\r\n\r\n", b"transfer-encoding: chunked", **no_length),
            (413,),
        ),
        "chunks and a length": (request(b"0\r\n\r\n", b"transfer-encoding: chunked", key=key), wrong),
        "a chunk of no size": (request(b"zz\r\n", b"transfer-encoding: chunked", **no_length), wrong),
        "a chunk of 2^72": (request(b"FFFFFFFFFFFFFFFFFF\r\nx", b"transfer-encoding: chunked", **no_length), wrong),
        "gzip in chunks": (request(ok, b"transfer-encoding: gzip, chunked", **no_length), wrong),
        "identity": (request(ok, b"transfer-encoding: identity", key=key), wrong),
        "two lengths": (request(ok, b"content-length: 5", key=key), wrong),
    }
    for length in (b"-1", b"ten", b"9" * 30, "²".encode("latin-1")):
        framing[f"a length of {length!r}"] = (request(b"x", b"content-length: " + length, **no_length), wrong)
    headers = {
        "NUL": b"x-a: a\x00b",
        "a control character": b"x-a: a\x01b",
        "a bare CR": b"x-a: a\rb",
        "a folded line": b"x-a: a\r\n b",
        "no colon": b"nonsense",
        "a name of bytes": b"x\xff: a",
        "a space before the colon": b"x-a : 1",
        "one megabyte": b"x-a: " + b"a" * 1_000_000,
        "100,000 of them": b"\r\n".join(b"x-a%d: 1" % n for n in range(100_000)),
        "a bad priority": b"x-tutelage-priority: \xff",
        "an endless idempotency key": b"idempotency-key: " + b"a" * 300,
        "an empty idempotency key": b"idempotency-key:",
    }
    taken = {
        "a domain of bytes": b"x-tutelage-domain: \xff\xfe\x80",
        "a tab": b"x-tutelage-domain: a\tb",
        "an idempotency key of bytes": b"idempotency-key: \xff\xfe",
        "a broken trace": b"traceparent: \xff00-zz",
        "a content type of bytes": b"content-type: \xff",
        "a pickle": b"content-type: application/octet-stream",
    }
    heads = {f"a header with {name}": (request(ok, line, key=key), wrong) for name, line in headers.items()}
    heads |= {f"a header with {name}": (request(ok, line, key=key), (200,)) for name, line in taken.items()}
    for name, line in {
        "bytes": b"Bearer \xff\xfe",
        "10,000 characters": b"Bearer tut_live_" + b"a" * 10_000,
        "no scheme": key.encode(),
        "%00": b"Bearer %00",
    }.items():
        heads[f"a key of {name}"] = (request(ok, b"authorization: " + line), (401,))
    paths = {
        "/v1/..%2f..%2fetc/passwd",
        "/../../etc/passwd",
        "//v1/models",
        "/v1/models/",
        "/v1/%00",
        "/v1/%zz",
        "/v1/%ff",
        "/V1/Models",
        "/v1/models;x=1",
        "/v1/" + "a" * 60_000,
        "/v1/" + "a" * 100_000,
        "*",
        "",
        "/static/../secrets",
        "/admin/v1/tenants/%00",
        "/admin/v1/tenants/%ff/keys",
        "/admin/v1/tenants/%2e%2e",
        "/admin/v1/usage?tenant=%ff%00",
        "/admin/v1/usage?model=%00",
        "/admin/v1/usage?limit=1&limit=2",
        "/admin/v1/audit?before=" + "9" * 30,
        "/admin/v1/audit?" + "&".join(f"a{n}=1" for n in range(5000)),
        "/admin/v1/keys/..%2f/revoke",
    }
    asked = {f"GET {path[:60]!r}": (request(key=party.operator, path=path, method="GET"), (*wrong, 405)) for path in paths}
    asked["GET bytes"] = (request(key=key, path=b"/v1/\xff\xfe", method="GET"), wrong)
    asked |= {
        f"{method} {path}": (request(key=key, path=path, method=method), (404, 405, 400))
        for method, path in (
            ("OPTIONS", "*"),
            ("CONNECT", "evil:80"),
            ("TRACE", "/v1/models"),
            ("BREW", "/v1/models"),
            ("GET", CHAT),
            ("POST", CHAT + "/"),
        )
    }
    posted = {
        "feedback with NUL": (b'{"request_id":"a\\u0000","score":1,"label":"\\u0000"}', FEEDBACK, key, (404,)),
        "a NaN score": (b'{"request_id":"a","score":NaN}', FEEDBACK, key, (400,)),
        "a text of a megabyte": (b'{"model":"all-minilm-l6-v2","input":"%s"}' % (b"word " * 200_000), EMBED, key, (400,)),
        "2,049 texts": (b'{"model":"all-minilm-l6-v2","input":[%s]}' % b",".join([b'"x"'] * 2049), EMBED, key, (400,)),
        "a name of bytes": (b'{"name":"\xff"}', "/admin/v1/tenants", party.operator, (400,)),
        "deep limits": (b'{"name":"x","limits":%s}' % deep(900, b'{"a":', b"}"), "/admin/v1/tenants", party.operator, (400,)),
        "limits of 20 digits": (b'{"name":"x","limits":{"concurrent":99999999999999999999}}', "/admin/v1/tenants", party.operator, (400,)),
        "chunks that are none, to an admin": (b"", "/admin/v1/tenants", party.operator, (400,)),
    }
    for name, (body, path, whose, statuses) in posted.items():
        asked[name] = (request(body, key=whose, path=path), statuses)
    broken = request(b"zz\r\n", b"transfer-encoding: chunked", key=party.operator, path="/admin/v1/tenants", length=False)
    asked["chunks that are none, to an admin"] = (broken, (400,))
    lines = {
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9,
        "TLS": bytes.fromhex("16030100a5010000a10303") + b"\0" * 160,
        "HTTP/0.9": b"GET /\r\n\r\n",
        "HTTP/2.5": b"GET / HTTP/2.5\r\n\r\n",
        "bytes": b"\0\1\2garbage\r\n\r\n",
        "an endless line": b"GET /" + b"a" * 5_000_000,
    }
    return framing | heads | asked | {name: (line, wrong) for name, line in lines.items()}


@pytest.fixture(scope="module")
def party(standing: tuple[Site, Replica]) -> Party:
    made = asyncio.run(enroll(standing[0], "raw"))
    standing[1].wait(key=made.key)
    return made


async def test_no_body_is_a_failure_of_ours_and_each_is_answered_at_once(standing: tuple[Site, Replica], party: Party) -> None:
    for name, (body, status) in bodies().items():
        for more in ((), (b"idempotency-key: " + name.encode(),)):
            heard = await say(standing[1].url, [request(body, *more, key=party.key)])
            assert heard.statuses == [status], f"{name}: {heard.statuses} {heard.ended}"
            assert heard.seconds < SOON, f"{name} took {heard.seconds:.2f} s"


async def test_no_request_is_a_failure_of_ours_and_each_is_answered_or_cut_off_at_once(
    standing: tuple[Site, Replica], party: Party
) -> None:
    for name, (sent, statuses) in requests(party).items():
        heard = await say(standing[1].url, [sent])
        assert heard.statuses or heard.ended == "closed", f"{name}: {heard.ended}"
        assert set(heard.statuses) <= set(statuses), f"{name}: {heard.statuses}, not {statuses}"
        assert heard.seconds < SOON, f"{name} took {heard.seconds:.2f} s"


async def test_requests_sent_in_one_go_are_all_answered(standing: tuple[Site, Replica], party: Party) -> None:
    one = request(chat(), key=party.key)
    heard = await say(standing[1].url, [one * 30 + request(b"[]", key=party.key) + one], responses=32)
    assert heard.statuses == [200] * 30 + [400, 200]


async def test_the_same_again_many_times_over_takes_no_memory(standing: tuple[Site, Replica], party: Party) -> None:
    url, replica = standing[1].url, standing[1]
    large = [sent for sent, _ in requests(party).values() if len(sent) > 50_000] + [
        request(body, key=party.key) for body, status in bodies().values() if status == 400
    ]
    for sent in large:  # whatever is set up once
        await say(url, [sent])
    before = replica.memory()
    for _ in range(3):
        await asyncio.gather(*(say(url, [sent], most=20) for sent in large))
    assert replica.memory() - before < MOST_GROWTH


async def test_slow_clients_are_cut_off_and_nobody_else_waits_for_them(standing: tuple[Site, Replica], party: Party) -> None:
    url = standing[1].url
    whole = request(chat(), key=party.key)
    head, body = whole[: -len(chat())], chat()
    slow = [
        *([bytes([byte]) for byte in whole] for _ in range(50)),  # its head by the byte
        *([head, *(bytes([byte]) for byte in body)] for _ in range(50)),  # its body by the byte
        *([head] for _ in range(50)),  # a head and nothing more
        *([b"GET /v1/mod"] for _ in range(50)),
    ]
    alone = await latencies(url, whole, 40)
    deaf = asyncio.create_task(take_nothing(standing, party))
    waiting = [asyncio.create_task(say(url, pieces, pause=0.7, most=SLOW + 5)) for pieces in slow]
    await asyncio.sleep(1)
    beside = await latencies(url, whole, 40)
    heard = await asyncio.gather(*waiting)
    assert {one.ended for one in heard} <= {"open", "closed"}, "some were left waiting"
    assert {status for one in heard for status in one.statuses} <= {408}
    assert max(one.seconds for one in heard) < SLOW + 1
    assert np.percentile(beside, 95) < 2 * np.percentile(alone, 95) + 0.1
    assert await deaf == "cancelled"


async def latencies(url: str, sent: bytes, times: int) -> list[float]:
    return [(await say(url, [sent])).seconds for _ in range(times)]


async def take_nothing(standing: tuple[Site, Replica], party: Party) -> str:
    """Ask for a stream that is larger than what the sockets between us hold, and read none of it; how the ledger says it ended."""
    site, replica = standing
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((urlsplit(replica.url).hostname, urlsplit(replica.url).port))
        deaf.sendall(request(chat(b',"stream":true', content=b'"marker-deaf chunks-50000"'), key=party.key))
        pool = await open_pool(site.stores.database_url, size=1)
        try:
            for _ in range(100):
                await asyncio.sleep(0.2)
                ended = await pool.fetchval(
                    "select finish_reason from interactions join bodies using (request_id) "
                    "where interactions.tenant_id = $1 and messages::text like '%marker-deaf%'",
                    party.tenant_id,
                )
                if ended is not None:
                    return str(ended)
        finally:
            await pool.close()
    return "not at all"
