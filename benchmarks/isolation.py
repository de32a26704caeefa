"""Two tenants do the same things at once, at random, and nothing of one may reach the other. `python -m benchmarks.isolation --help`.

Both send the same prompts under the same idempotency keys, so that only the tenant tells their requests apart; the model names each of its
calls in its answer, and everything that a tenant makes up holds a canary of its own. Every byte of every response is searched for what is
the other's: its canaries, calls, request ids, keys and its own id. Afterwards the stores are searched too. It refuses to know how the
gateway keeps tenants apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import Progress

from benchmarks import replicas, systems
from benchmarks.gateway import machine
from benchmarks.replicas import Party, Replica, Site, enroll
from tutelage.fleet import engines
from tutelage.fleet.local import prepare_encoder
from tutelage.settings import Home
from tutelage.stores.database import open_pool

PROMPTS = 60  # that both tenants send: few, so that many are cached, joined or answered before
OWNED = re.compile(rb"canary-[a-z]+-\d+|call-\d+|(?:chatcmpl|embd)-[0-9a-f]{32}|ten_[0-9a-f]{16}|tut_live_[0-9a-f]{12}")


@dataclass
class Side:
    """One tenant: who it is, what is known to be its own, and the ids it may name."""

    name: str
    party: Party
    requests: list[str] = field(default_factory=list)
    canaries: int = 0

    def canary(self) -> str:
        self.canaries += 1
        return f"canary-{self.name}-{self.canaries}"


class Owners:
    """Whose each thing is: of whoever was first seen with it, which for a canary is whoever made it up. `crossed` tells of the others."""

    def __init__(self) -> None:
        self._of: dict[bytes, str] = {}
        self.crossed: list[str] = []

    def own(self, thing: str, side: Side) -> None:
        self._of[thing.encode()] = side.name

    def look(self, side: Side, where: str, content: bytes) -> None:
        for thing in OWNED.findall(content):
            owner = thing.split(b"-")[1].decode() if thing.startswith(b"canary-") else self._of.setdefault(thing, side.name)
            if owner != side.name:
                self.crossed.append(f"{thing.decode()} of {owner} in {where} of {side.name}")

    def __len__(self) -> int:
        return len(self._of)


@dataclass(frozen=True)
class Sent:
    """One operation: what is asked with whose key, and what it may be answered."""

    kind: str
    method: str
    path: str
    statuses: tuple[int, ...]
    body: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    administrator: bool = False


def draw(chance: random.Random, side: Side, other: Side) -> Sent:
    """A random operation of `side`; some name what is the other's, and must find nothing."""
    kind = chance.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    return KINDS[kind][1](chance, side, other)


def _body(chance: random.Random, side: Side, *, own: float = 0.2, **more: Any) -> dict[str, Any]:
    text = f"What is item {chance.randrange(PROMPTS)}?"
    if chance.random() < own:
        text += f" {side.canary()}"
    return {"model": chance.choice(("mock", "auto", "teacher")), "messages": [{"role": "user", "content": text}], **more}


def _chat(chance: random.Random, side: Side, _: Side) -> Sent:
    headers = {} if chance.random() < 0.8 else {"x-tutelage-cache": chance.choice(("bypass", "private"))}
    if chance.random() < 0.1:
        headers["x-tutelage-domain"] = side.canary()
    return Sent("chat", "POST", "/v1/chat/completions", (200,), _body(chance, side, temperature=chance.choice((0, 0, 0, 1))), headers)


def _stream(chance: random.Random, side: Side, _: Side) -> Sent:
    return Sent("stream", "POST", "/v1/chat/completions", (200,), _body(chance, side, stream=True))


def _idempotent(chance: random.Random, side: Side, _: Side) -> Sent:
    number = chance.randrange(2000)
    body = {"model": "mock", "messages": [{"role": "user", "content": f"Order {number}"}], "stream": number % 3 == 0}
    if chance.random() < 0.05:
        body["seed"] = 1
    return Sent("idempotent", "POST", "/v1/chat/completions", (200, 409, 422), body, {"idempotency-key": f"order-{number}"})


def _embed(chance: random.Random, side: Side, _: Side) -> Sent:
    headers = {"idempotency-key": f"embed-{chance.randrange(50)}"} if chance.random() < 0.3 else {}
    text = f"item {headers.get('idempotency-key', chance.randrange(PROMPTS))}"
    body = {"model": "all-minilm-l6-v2", "input": text, "encoding_format": "base64"}
    return Sent("embeddings", "POST", "/v1/embeddings", (200, 409), body, headers)


def _feedback(chance: random.Random, side: Side, other: Side) -> Sent:
    theirs = chance.random() < 0.3
    ids = (other if theirs else side).requests or ["chatcmpl-none"]
    body = {"request_id": chance.choice(ids[-500:]), "score": 1, "label": side.canary(), "comment": side.canary()}
    # the refusal tells the id that was asked for: what the asker knew already
    return Sent("feedback on another's" if theirs else "feedback", "POST", "/v1/feedback", (404,) if theirs else (200, 404), body)


def _refused(chance: random.Random, side: Side, _: Side) -> Sent:
    message = {"role": "user", "content": "x"}
    body: Any = chance.choice(({"model": side.canary(), "messages": [message]}, {"model": "mock", "messages": side.canary()}, {}))
    return Sent("refused", "POST", "/v1/chat/completions", (400, 404), body)


def _models(_: random.Random, side: Side, __: Side) -> Sent:
    return Sent("models", "GET", "/v1/models", (200,))


def _report(chance: random.Random, side: Side, _: Side) -> Sent:
    own = f"/tenants/{side.party.tenant_id}"
    paths = ("/usage?limit=50", "/usage?by=key,day", "/usage?by=domain&limit=1000", "/usage?format=csv&by=model", "/billing",
             "/billing?format=csv", "/audit?limit=50", "/audit/heads", own, f"{own}/keys")  # fmt: skip
    return Sent("report", "GET", f"/admin/v1{chance.choice(paths)}", (200,), administrator=True)


def _trespass(chance: random.Random, _: Side, other: Side) -> Sent:
    """What is the other's, named as it is."""
    tenant, key = other.party.tenant_id, other.party.key.split("_")[2]
    method, path = chance.choice((
        ("GET", f"/tenants/{tenant}"), ("GET", f"/tenants/{tenant}/keys"), ("GET", f"/usage?tenant={tenant}"),
        ("GET", f"/audit?tenant={tenant}"), ("GET", f"/billing?tenant={tenant}"), ("GET", f"/audit/verify?tenant={tenant}"),
        ("POST", f"/tenants/{tenant}/erase"), ("POST", f"/keys/{key}/revoke"), ("POST", f"/keys/{key}/rotate"),
    ))  # fmt: skip
    return Sent("trespass", method, f"/admin/v1{path}", (404, 403), {} if method == "POST" else None, administrator=True)


KINDS: dict[str, tuple[float, Callable[[random.Random, Side, Side], Sent]]] = {
    "chat": (40, _chat), "stream": (14, _stream), "idempotent": (14, _idempotent), "embeddings": (6, _embed), "feedback": (10, _feedback),
    "refused": (4, _refused), "models": (4, _models), "report": (4, _report), "trespass": (4, _trespass),
}  # fmt: skip


async def ask(session: aiohttp.ClientSession, url: str, side: Side, sent: Sent, owners: Owners) -> tuple[int, str]:
    """Do it and look at every byte that comes back; its status, and how the cache took part."""
    key = side.party.administrator if sent.administrator else side.party.key
    headers = {"authorization": f"Bearer {key}", **sent.headers}
    async with session.request(sent.method, url + sent.path, json=sent.body, headers=headers) as response:
        content = await response.read()
        told = b"\n".join(b"%s: %s" % (name, value) for name, value in response.raw_headers) + b"\n\n" + content
        if sent.kind == "trespass" or sent.kind == "feedback on another's":
            for known in (sent.path.encode(), str((sent.body or {}).get("request_id")).encode(), *OWNED.findall(sent.path.encode())):
                told = told.replace(known, b"")  # what was asked for is told back
        owners.look(side, f"{sent.kind} {sent.method} {sent.path}", told)
        if response.status == 200 and sent.path == "/v1/chat/completions":
            side.requests.append(response.headers["x-request-id"])
        return response.status, response.headers.get("x-tutelage-cache", "")


async def run(
    site: Site, running: Sequence[Replica], *, operations: int, clients: int, seed: int, told: Callable[[], Any]
) -> dict[str, Any]:
    """The whole experiment on replicas that are up; a report, in which `crossed` and `wrong` should be empty."""
    sides = [Side(name, await enroll(site, f"canary-{name}-0")) for name in ("red", "blue")]
    owners, wrong = Owners(), Counter[str]()
    for side in sides:
        for text in (side.party.tenant_id, side.party.key[:21], side.party.administrator[:21]):
            owners.own(text, side)
        for replica in running:
            await asyncio.to_thread(replica.wait, key=side.party.key)
    kinds, caches, chance, left = Counter[str](), Counter[str](), random.Random(seed), operations
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def client(number: int) -> None:
            nonlocal left
            while left > 0:
                left -= 1
                side = sides[number % 2]
                sent = draw(chance, side, sides[1 - number % 2])
                status, cache = await ask(session, chance.choice(running).url, side, sent, owners)
                kinds[f"{sent.kind}: {status}"] += 1
                caches[cache] += 1
                if status not in sent.statuses:
                    wrong[f"{sent.kind} {sent.method} {sent.path.split('?')[0]}: {status}"] += 1
                told()

        began = time.monotonic()
        await asyncio.gather(*(client(n) for n in range(clients)))
        took = time.monotonic() - began
        public = [await (await session.get(running[0].url + path)).read() for path in ("/metrics", "/openapi.json", "/health/ready")]
    caches.pop("", None)
    leaks = [thing.decode() for text in public for thing in OWNED.findall(text)]
    return {
        "operations": operations, "seconds": took, "answers": dict(sorted(kinds.items())), "cache": dict(caches),
        "things_owned": len(owners), "crossed": owners.crossed[:20], "wrong": dict(wrong), "public": leaks[:20],
        "stored": await stored(site, sides, owners),
    }  # fmt: skip


async def stored(site: Site, sides: Sequence[Side], owners: Owners) -> list[str]:
    """What lies among one tenant's rows and is the other's."""
    before = len(owners.crossed)
    pool = await open_pool(site.stores.database_url, size=1)
    queries: dict[str, str] = {
        "ledger": "select request_id || coalesce(domain, '') || coalesce(given_domain, '') as text from interactions where tenant_id = $1",
        "bodies": "select messages::text || answer as text from bodies where tenant_id = $1",
        "feedback": "select request_id || label || comment as text from feedback where tenant_id = $1",
        "audit": "select actor || subject || detail as text from audit where tenant_id = $1",
        "replies": "select headers::text || convert_from(body, 'UTF8') as text from replies where tenant_id = $1 and body is not null",
    }
    try:
        for side in sides:
            for where, query in queries.items():
                for row in await pool.fetch(query, side.party.tenant_id):
                    owners.look(side, f"stored {where}", row["text"].encode())
    finally:
        await pool.close()
    return owners.crossed[before:][:20]


def broken(report: dict[str, Any]) -> bool:
    return any(report[name] for name in ("crossed", "wrong", "public", "stored"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.isolation", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=32, help="half of them of each tenant")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("isolation-report"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="tutelage-isolation-") as folder, Progress(console=console) as progress:
        task = progress.add_task("two tenants", total=arguments.operations)
        home = Home(Path(folder) / "home")
        home.root.mkdir()
        prepare_encoder(home.models / "encoder")
        site = Site(home, home.folder("config"), engines.start(home))
        try:
            with systems.mock(Path(folder), record=True) as upstream:
                site.configure(upstream)
                with replicas.running(site, replicas=1, workers=arguments.workers) as started:
                    report = asyncio.run(
                        run(
                            site, started, operations=arguments.operations, clients=arguments.clients, seed=arguments.seed,
                            told=lambda: progress.advance(task),
                        )
                    )  # fmt: skip
        except KeyboardInterrupt:
            console.print("interrupted; everything that was started has been ended")
            return 130
        finally:
            engines.stop(home)
    report = {"machine": machine(), "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), **report}
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1))
    for name, value in report.items():
        print(f"{name}: {json.dumps(value)}")
    return int(broken(report))


if __name__ == "__main__":
    sys.exit(main())
