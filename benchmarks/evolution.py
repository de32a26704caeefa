"""How soon evolution reacts: `python -m benchmarks.evolution --models DIR`; a home with an embedded PostgreSQL of its own.

From the decision to a registered student whose adapter passes every check of the tier; and from a durable interaction to the gap that it
reveals, with a full window of traffic behind it. It refuses to train anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from flows import students
from flows.workshop import Cycle
from inference import adapters, base
from tutelage import gaps
from tutelage.evolution.gaps import EvolveSettings
from tutelage.fleet import engines
from tutelage.fleet.local import BASE
from tutelage.records import Interaction, Tenant
from tutelage.settings import CHECKOUT, Home
from tutelage.stores import interactions, registry, tenants
from tutelage.stores.database import Pool, open_pool

TENANT = Tenant("ten_a", "acme", "enterprise")
DOMAINS = 20


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help=f"a folder that holds {BASE}: models/ of a home that was served")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--window", type=int, default=20_000, help="recorded interactions behind each look at the gaps")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        (home.models / BASE).symlink_to((arguments.models / BASE).resolve())
        try:
            report = asyncio.run(measure(home, engines.start_database(home), arguments.rounds, arguments.window))
        finally:
            engines.stop(home)
    for name, seconds in report.items():
        middle, high = np.quantile(seconds, [0.5, 0.95])
        print(f"{name}: median {middle:.3f} s, p95 {high:.3f} s, most {max(seconds):.3f} s, n {len(seconds)}")
    if arguments.report:
        arguments.report.write_text(json.dumps(report, indent=2) + "\n")


async def measure(home: Home, url: str, rounds: int, window: int) -> dict[str, list[float]]:
    """Seconds of each round by what was measured."""
    pool = await open_pool(url, size=4)
    try:
        await tenants.create_tenant(pool, TENANT)
        await registry.open_cycle(pool, "c1", TENANT.id)
        base.fingerprint(home.models / BASE)  # a tier that has loaded the base has left it there
        spawned = [await spawn(pool, home, url, number) for number in track(range(rounds), "spawning", console=Console(stderr=True))]
        await record(pool, [interaction(number, f"domain-{number % DOMAINS}") for number in range(window)])
        seen = [await reveal(pool, number) for number in track(range(rounds), "looking", console=Console(stderr=True))]
    finally:
        await pool.close()
    return {"decision to a registered, loadable student": spawned, f"interaction to visible gap, {window} behind it": seen}


async def spawn(pool: Pool, home: Home, url: str, number: int) -> float:
    cycle = Cycle("c1", TENANT.id, TENANT.name, home.root, CHECKOUT / "configs", url)
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        student = await students.begin(cycle, f"domain-{number}")
    digest = await pool.fetchval("select fresh_digest from versions where student = $1", student.name)
    adapters.verify(student.folder / registry.FRESH, digest=digest, base_fingerprint=base.fingerprint(home.models / BASE))
    return time.perf_counter() - began


async def reveal(pool: Pool, number: int) -> float:
    """The domain's hundredth request makes it a gap worth a student."""
    domain = f"new-{number}"
    await record(pool, [interaction(f"{domain}-{n}", domain) for n in range(99)])
    last = interaction(f"{domain}-last", domain)
    began = time.perf_counter()
    await record(pool, [last])
    found = await gaps.now(pool, EvolveSettings(max_students=10_000, training_seconds_per_day=1e12), [TENANT.id])
    seconds = time.perf_counter() - began
    assert [gap["decision"] for gap in found if gap["domain"] == domain] == ["train"]
    return seconds


async def record(pool: Pool, rows: Sequence[Interaction]) -> None:
    recorder = interactions.Recorder(pool, flush_seconds=0, batch_rows=200, deadline_seconds=60)
    recorder.start()
    await asyncio.gather(*(recorder.record(row) for row in rows))
    await recorder.stop()


def interaction(name: Any, domain: str) -> Interaction:
    return Interaction(
        request_id=f"r{name}", tenant_id=TENANT.id, key_id="k", created_at=datetime.now(UTC), prompt_hash=b"h", answer="4",
        messages=[{"role": "user", "content": f"question {name}"}], model="teacher", tier="teacher", route="cascade", reason="",
        cache="miss", domain=domain, given_domain=None, confidence=None, finish_reason="stop", prompt_tokens=7, completion_tokens=1,
        tokens_estimated=False, cost_microusd=30, latency_ms=12,
    )  # fmt: skip


if __name__ == "__main__":
    main()
