"""Random SIGKILLs of gateways under load, and what must hold afterwards. `python -m benchmarks.crashes --help`.

Replicas with several workers share one PostgreSQL and one Valkey; a kill takes one worker, a replica's first process, or all of a replica.
Then the ledger, the audit chains and the model's own record of who asked it are compared, call by call. It refuses to know how the
gateway settles anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks import replicas, systems
from benchmarks.gateway import machine
from benchmarks.mock import USAGE
from benchmarks.replicas import PRICE, Party, Replica, Site, enroll
from tutelage.fleet import engines
from tutelage.fleet.local import prepare_encoder
from tutelage.settings import CHECKOUT, Home
from tutelage.stores.database import Pool, open_pool

Kind = Literal["whole", "stream", "idempotent"]
MODEL = "mock-d20"
SETTLED_SECONDS = 60.0  # within which what a dead worker left running must be on the bill
CALL_MICROUSD = round(USAGE["prompt_tokens"] * PRICE["input_per_mtok"] + USAGE["completion_tokens"] * PRICE["output_per_mtok"])


@dataclass
class Attempt:
    """One request and its retries. `answered`: ids of whole replies, as the client saw them."""

    marker: str
    party: str
    kind: Kind
    answered: list[str] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    cut: int = 0
    unreached: int = 0


class Load:
    """Clients in a closed loop over all replicas: most ask plainly, some stream, some retry under an
    idempotency key until they are answered."""

    def __init__(self, urls: Sequence[str], parties: dict[str, Party], *, seed: int) -> None:
        self._urls, self._parties, self._random = urls, parties, random.Random(seed)
        self._numbers = itertools.count()
        self._stop = False
        self.attempts: list[Attempt] = []

    async def run(self, clients: int, seconds: asyncio.Event) -> None:
        """Until `seconds` is set; what was begun is finished."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # a connection each: whoever is killed loses only its own
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as session:
            running = [asyncio.create_task(self._client(session)) for _ in range(clients)]
            await seconds.wait()
            self._stop = True
            await asyncio.gather(*running)

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self._stop:
            number = next(self._numbers)
            kind: Kind = self._random.choices(("whole", "stream", "idempotent"), (4, 1, 1))[0]
            party = self._random.choices(list(self._parties), (3, 1))[0]
            attempt = Attempt(f"marker-{party}-{number:07d}-end", party, kind)
            self.attempts.append(attempt)
            deadline = time.monotonic() + 40  # a dead one's idempotency key is free after 15 seconds
            while not await self._ask(session, attempt):
                if kind != "idempotent" or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.5)

    async def _ask(self, session: aiohttp.ClientSession, attempt: Attempt) -> bool:
        """Whether there is no use in asking again."""
        body: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": attempt.marker}]}
        headers = {"authorization": f"Bearer {self._parties[attempt.party].key}"}
        if attempt.kind == "stream":
            body["stream"] = True
        if attempt.kind == "idempotent":
            headers["idempotency-key"] = attempt.marker
        try:
            async with session.post(f"{self._random.choice(self._urls)}/v1/chat/completions", json=body, headers=headers) as response:
                text = await response.read()
                if response.status != 200:
                    attempt.refused[response.status] += 1
                    await asyncio.sleep(0.02)
                    return response.status not in (409, 503)
                if attempt.kind == "stream" and not text.rstrip().endswith(b"data: [DONE]"):
                    attempt.cut += 1
                    return False
                attempt.answered.append(response.headers["x-request-id"])
                return True
        except aiohttp.ClientConnectorError:
            attempt.unreached += 1
            await asyncio.sleep(0.1)
            return False
        except (aiohttp.ClientError, TimeoutError):
            attempt.cut += 1
            await asyncio.sleep(0.02)
            return False


@dataclass(frozen=True)
class Kill:
    """At `seconds` since the start, of what."""

    seconds: float
    what: Literal["worker", "first process", "replica"]


async def kill_at_random(running: Sequence[Replica], kills: int, *, pause: float, seed: int, told: Any) -> list[Kill]:
    """Each kill hits some replica that answers. Whoever ended is started again at once, as a supervisor would."""
    chance, done, began = random.Random(seed), [], time.monotonic()
    for _ in range(kills):
        await asyncio.sleep(pause * chance.uniform(0.5, 1.5))
        while not (able := [replica for replica in running if replica.mind() and await asyncio.to_thread(replica.answers)]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        victim = chance.choice(able)
        what: Any = chance.choices(("worker", "first process", "replica"), (6, 2, 2))[0]
        if what == "worker" and (workers := victim.workers()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(workers).pid, signal.SIGKILL)
        else:
            await asyncio.to_thread(victim.kill_first if what == "first process" else victim.kill)
        for replica in running:
            replica.mind()
        done.append(Kill(round(time.monotonic() - began, 2), what))
        told()
    for replica in running:
        await asyncio.to_thread(replica.wait)
    return done


async def settle(site: Site) -> float:
    """Seconds until nothing that a dead worker left is unsettled, at most twice SETTLED_SECONDS."""
    import valkey.asyncio

    client, began = valkey.asyncio.from_url(site.stores.valkey_url), time.monotonic()
    try:
        while time.monotonic() - began < 2 * SETTLED_SECONDS:
            left = [key async for key in client.scan_iter("tutelage:worker:*:running")]
            if not left:
                break
            await asyncio.sleep(0.5)
        return time.monotonic() - began
    finally:
        await client.aclose()


async def audit(pool: Pool, attempts: Sequence[Attempt], record: dict[str, int], quotas: dict[str, int]) -> dict[str, Any]:
    """Compare what clients saw, the ledger with its chains, and the model's own record. `broken` lists what does not hold."""
    rows = await pool.fetch(
        "select i.request_id, i.tenant_id, i.route, i.finish_reason, i.cost_microusd, i.tokens_estimated, i.prompt_tokens, "
        "i.completion_tokens, i.cache, i.created_at, substring(b.messages::text from 'marker-.+?-end') as marker "
        "from interactions i left join bodies b using (request_id)"
    )
    links = await pool.fetch("select subject, at::timestamptz as at from audit where kind = 'request'")
    ledger = {row["request_id"]: row for row in rows}
    linked = Counter(link["subject"] for link in links)
    by_marker: dict[str, list[Any]] = {}
    for row in rows:
        by_marker.setdefault(row["marker"], []).append(row)
    lost = [row for row in rows if row["route"] == "lost"]
    broken = {
        "acknowledged, not once in the ledger": [a.marker for a in attempts for one in a.answered if one not in ledger],
        "acknowledged, not once in its chain": [a.marker for a in attempts for one in a.answered if linked[one] != 1],
        "recorded, not once in its chain": [one for one in ledger if linked[one] != 1],
        "in a chain, not in the ledger": [one for one in linked if one not in ledger],
        "acknowledged twice": [a.marker for a in attempts if len(set(a.answered)) > 1],
        "answers of more calls than were made": _overbilled(by_marker, record),
        "acknowledged, billed otherwise than the model counts": _misbilled(attempts, ledger, record),
        "lost, not marked so": [row["request_id"] for row in lost if row["finish_reason"] != "lost" or not row["tokens_estimated"]],
        "quota exceeded": [name for name, most in quotas.items() if sum(row["tenant_id"] == name for row in rows) > most],
    }
    unanswered = Counter({marker: calls - len(by_marker.get(marker, ())) for marker, calls in record.items()})
    calls_cut = sum(n for n in unanswered.values() if n > 0)
    if not calls_cut <= len(lost) <= calls_cut + sum(a.cut for a in attempts):
        broken["calls without a row that are not settled as lost"] = [f"{calls_cut} calls, {len(lost)} settled"]
    at = {link["subject"]: link["at"] for link in links}
    waits = [(at[row["request_id"]] - row["created_at"]).total_seconds() for row in lost]
    broken["lost, settled late"] = [f"{seconds:.0f} s" for seconds in waits if seconds > SETTLED_SECONDS]
    return {
        "broken": {name: found[:10] for name, found in broken.items() if found},
        "acknowledged": sum(len(a.answered) for a in attempts),
        "refused": dict(sum((a.refused for a in attempts), Counter())),
        "cut": sum(a.cut for a in attempts),
        "unreached": sum(a.unreached for a in attempts),
        "ledger_rows": len(rows),
        "lost": len(lost),
        "calls": sum(record.values()),
        "calls_cut": calls_cut,
        "bill_microusd": sum(row["cost_microusd"] for row in rows),
        "acknowledged_microusd": sum(ledger[one]["cost_microusd"] for a in attempts for one in a.answered if one in ledger),
        "lost_settled_seconds": {"p50": float(np.median(waits)), "max": max(waits)} if waits else None,
        "quotas": {name: [sum(row["tenant_id"] == name for row in rows), most] for name, most in quotas.items()},
    }


def _overbilled(by_marker: dict[str, list[Any]], record: dict[str, int]) -> list[str]:
    return [m for m, found in by_marker.items() if m is not None and sum(row["cache"] != "hit-exact" for row in found) > record.get(m, 0)]


def _misbilled(attempts: Sequence[Attempt], ledger: dict[str, Any], record: dict[str, int]) -> list[str]:
    """An answer costs one call. Only a request that was asked again after a cut may have caused more calls than its answer tells."""
    wrong = []
    for attempt in attempts:
        rows = [ledger[one] for one in set(attempt.answered) if one in ledger]
        calls = record.get(attempt.marker, 0)
        if rows and (any(row["cost_microusd"] != CALL_MICROUSD for row in rows) or not len(rows) <= calls <= len(rows) + attempt.cut):
            wrong.append(f"{attempt.marker}: {calls} calls, {[row['cost_microusd'] for row in rows]}")
    return wrong


def verified(site: Site) -> dict[str, Any]:
    """What `tutelage audit verify` says."""
    command = [sys.executable, "-m", "tutelage.cli", "audit", "verify", "--json", "--home", str(site.home.root)]
    environment = {**os.environ, "TUTELAGE_DATABASE_URL": site.stores.database_url}
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, env=environment, check=False)
    return {"exit": done.returncode, **(json.loads(done.stdout) if done.stdout.startswith("{") else {"error": done.stderr[-500:]})}


async def crash(
    site: Site, running: Sequence[Replica], upstream: str, *, kills: int, clients: int, quota: int, pause: float, seed: int, told: Any
) -> dict[str, Any]:
    """The whole experiment on replicas that are up; a report. `quota`: queries a day of the second tenant."""
    parties = {"a": await enroll(site, f"a{seed}"), "b": await enroll(site, f"b{seed}", queries_per_day=quota)}
    for replica in running:
        for party in parties.values():
            await asyncio.to_thread(replica.wait, key=party.key)
    load, enough = Load([r.url for r in running], parties, seed=seed), asyncio.Event()
    loading = asyncio.create_task(load.run(clients, enough))
    began = time.monotonic()
    done = await kill_at_random(running, kills, pause=pause, seed=seed, told=told)
    enough.set()
    await loading
    took = time.monotonic() - began
    pool = await open_pool(site.stores.database_url, size=2)
    try:
        waited = await settle(site)
        async with aiohttp.ClientSession() as session, session.get(f"{upstream}/record") as response:
            record = (await response.json())["markers"]
        mine = {marker: n for marker, n in record.items() if marker.startswith(("marker-a-", "marker-b-"))}
        found = await audit(pool, load.attempts, mine, {parties["b"].tenant_id: quota})
    finally:
        await pool.close()
    if waited > SETTLED_SECONDS:
        found["broken"]["not settled in time"] = [f"{waited:.0f} s"]
    chains = await asyncio.to_thread(verified, site)
    if chains["exit"]:
        found["broken"]["chains"] = [chains]
    kinds = dict(Counter(kill.what for kill in done))
    return {
        "kills": kinds,
        "seconds": took,
        "settled_after_seconds": waited,
        **found,
        "chains": chains,
        "kill_times": [asdict(k) for k in done],
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    told = [f"Machine: {report['machine']}; {report['date']}: `{report['command']}`.", "", "| | |", "|---|---|"]
    for name in (
        "kills", "seconds", "acknowledged", "refused", "cut", "unreached", "ledger_rows", "lost", "calls", "calls_cut", "bill_microusd",
        "acknowledged_microusd", "lost_settled_seconds", "settled_after_seconds", "quotas", "chains",
    ):  # fmt: skip
        value = report[name]
        told.append(f"| {name.replace('_', ' ')} | {round(value, 1) if isinstance(value, float) else json.dumps(value)} |")
    told += ["", "What does not hold: " + (json.dumps(report["broken"], indent=1) if report["broken"] else "nothing.")]
    return "\n".join(told) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crashes", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="of each replica")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--quota", type=int, default=1000, help="queries a day of the second tenant")
    parser.add_argument("--pause", type=float, default=2.5, help="seconds from one kill to the next, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("crash-report"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="tutelage-crashes-") as folder, Progress(console=console) as progress:
        task = progress.add_task("killing gateways", total=arguments.kills)
        home = Home(Path(folder) / "home")
        home.root.mkdir()
        prepare_encoder(home.models / "encoder")
        site = Site(home, home.folder("config"), engines.start(home))
        try:
            with systems.mock(Path(folder), record=True) as upstream:
                # a worker that counts for itself has no reservation that could outlive it: a busy machine must not look like an outage
                site.configure(upstream, admission_deadline_seconds=1.0)
                with replicas.running(site, replicas=arguments.replicas, workers=arguments.workers) as running:
                    report = asyncio.run(
                        crash(
                            site, running, upstream, kills=arguments.kills, clients=arguments.clients, quota=arguments.quota,
                            pause=arguments.pause, seed=arguments.seed, told=lambda: progress.advance(task),
                        )
                    )  # fmt: skip
        except KeyboardInterrupt:
            console.print("interrupted; everything that was started has been ended")
            return 130
        finally:
            engines.stop(home)
    report = {"machine": machine(), "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), **report}
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1, default=str))
    (arguments.out / "report.md").write_text(table(report))
    print(table(report))
    return int(bool(report["broken"]))


if __name__ == "__main__":
    sys.exit(main())
