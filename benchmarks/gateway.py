"""Gateways side by side in one run: added latency, throughput, streams, cached answers, memory. `python -m benchmarks.gateway --help`.

Every round visits every system in another order, so that a machine that slows down slows all of them; figures are medians of rounds with
bootstrap intervals, and latency is what the gateway adds to a direct call of the same round. It refuses to hide where we lose.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks import systems
from benchmarks.systems import NotInstalled, Running
from tutelage.records import Interaction
from tutelage.settings import CHECKOUT
from tutelage.stores.database import open_pool
from tutelage.stores.interactions import RECORD, as_json

PROMPT = "marker-############ Say forty two, please, and nothing else."
CONCURRENCY = (1, 16, 64)
OURS = "tutelage-governed"
Rounds = dict[str, dict[str, list[dict[str, Any]]]]  # system -> measure -> one result a round


def load(
    target: Running,
    *,
    connections: int = 1,
    seconds: float,
    stream: bool = False,
    unique: bool = True,
    rate: float = 0,
    model: str | None = None,
) -> dict[str, Any]:
    """One measurement by a process of its own, beside the mock."""
    prompt = PROMPT if unique else PROMPT.replace("#", "0")
    body: dict[str, Any] = {"model": model or target.model, "messages": [{"role": "user", "content": prompt}]}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    command = [sys.executable, "-m", "benchmarks.load", f"{target.url}/v1/chat/completions", "--headers", json.dumps(target.headers)]
    command += ["--body", json.dumps(body), "--connections", str(connections), "--seconds", str(seconds), "--rate", str(rate)]
    done = subprocess.run([*command, *(["--unique"] if unique else [])], capture_output=True, text=True, cwd=CHECKOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"the load on {target.name} failed: {done.stderr[-500:]}")
    return dict(json.loads(done.stdout))


def measures(seconds: float) -> dict[str, Callable[[Running], dict[str, Any]]]:
    """What is measured of every system in every round."""
    found: dict[str, Callable[[Running], dict[str, Any]]] = {f"c{n}": partial(load, connections=n, seconds=seconds) for n in CONCURRENCY}
    return found | {"stream": partial(load, connections=16, seconds=seconds, stream=True)}


def run(arguments: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """The whole comparison; what `report.json` holds."""
    rounds: Rounds = {}
    absent: dict[str, str] = {}
    with ExitStack() as started:
        upstream = started.enter_context(systems.mock(folder))
        running = [Running("direct", upstream, {}, "mock", "", "the mock itself")]
        for name, start in systems.starters(arguments.cache).items():
            if arguments.only and name not in arguments.only:
                continue
            console.print(f"starting {name}")
            try:
                running.append(started.enter_context(start(folder, upstream)))
            except NotInstalled as missing:
                absent[name] = str(missing)
                console.print(f"[yellow]{name} is left out: {missing}")
        for target in running:
            load(target, connections=4, seconds=1)  # the first requests of a process are not like the others
        wanted = measures(arguments.seconds)
        cached = {OURS: lambda target: load(target, connections=128, seconds=arguments.seconds, unique=False)}
        with Progress(console=console) as progress:
            task = progress.add_task("measuring", total=arguments.rounds * len(running))
            for number in range(arguments.rounds):
                for target in random.sample(running, len(running)):
                    mine = rounds.setdefault(target.name, {})
                    with systems.alone(target, running):
                        for measure, take in [*wanted.items(), *([("cached", cached[target.name])] if target.name in cached else [])]:
                            mine.setdefault(measure, []).append(take(target))
                    mine.setdefault("memory", []).append({"mb": target.memory_mb()})
                    progress.advance(task)
                # what was measured is not lost when a later part fails or is broken off
                (arguments.out / "rounds.json").write_text(json.dumps({"rounds": number + 1, "figures": figures(rounds)}, indent=1))
        extra = _long(arguments, running, console)
    extra["cached_whole_machine"] = whole_machine(arguments, folder, console)
    return {
        "machine": machine(), "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "commit": _commit(),
        "systems": {r.name: {"version": r.version, "settings": r.settings} for r in running}, "absent": absent,
        "rounds": rounds, "figures": figures(rounds), **extra,
    }  # fmt: skip


def whole_machine(arguments: argparse.Namespace, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Cached answers with a worker a core and nothing pinned: gateway, PostgreSQL, Valkey and the load share the machine."""
    if arguments.only and OURS not in arguments.only:
        return []
    console.print("cached answers on the whole machine")
    with (
        systems.mock(folder) as upstream,
        systems.tutelage(folder, upstream, name="whole", workers=2, cores=systems.CORES, semantic_cache=False) as target,
    ):
        systems.pin(0, systems.CORES)
        try:
            load(target, connections=4, seconds=1, unique=False)
            return [load(target, connections=128, seconds=arguments.seconds, unique=False) for _ in range(arguments.rounds)]
        finally:
            systems.pin(0, systems.OTHER_CORES)


def _long(arguments: argparse.Namespace, running: Sequence[Running], console: Console) -> dict[str, Any]:
    """What takes minutes: an open loop at 100 requests a second on a model of 150 ms, and the gateway's memory meanwhile."""
    ours = next((r for r in running if r.name == OURS), None)
    if ours is None:
        return {}
    extra: dict[str, Any] = {"commit_wait": asyncio.run(commit_wait(ours))}
    if not arguments.open_minutes:
        return extra
    console.print(f"100 requests a second for {arguments.open_minutes:g} minutes on a model that takes 150 ms")
    points: list[tuple[float, float]] = []
    with ThreadPoolExecutor(1) as beside:
        began = time.monotonic()
        loading = beside.submit(load, ours, seconds=60 * arguments.open_minutes, rate=100, model="mock-d150")
        while not loading.done():
            points.append(((time.monotonic() - began) / 60, ours.memory_mb()))
            wait([loading], timeout=15)
    minutes, sizes = np.array(points).T
    later = minutes >= 1  # the first minute fills caches
    slope = float(np.polyfit(minutes[later], sizes[later], 1)[0] * 60) if later.sum() > 3 else None
    return extra | {"open_loop": loading.result() | {"rate": 100}, "memory": {"mb_by_minute": points, "mb_per_hour": slope}}


async def commit_wait(target: Running, times: int = 300) -> dict[str, float]:
    """Milliseconds that one interaction takes to be durable by itself: what a request at c=1 waits for its record."""
    pool = await open_pool(target.database_url, size=1)
    try:
        row = await pool.fetchrow("select id as key_id, tenant_id from keys where tenant_id is not null limit 1")
        assert row is not None
        took = []
        for number in range(times):
            batch = as_json([_interaction(number, row["tenant_id"], row["key_id"])])
            began = time.perf_counter()
            await pool.execute(RECORD, batch)
            took.append(1000 * (time.perf_counter() - began))
        return dict(zip(("p50_ms", "p95_ms"), map(float, np.percentile(took, [50, 95])), strict=True))
    finally:
        await pool.close()


def _interaction(number: int, tenant_id: str, key_id: str) -> Interaction:
    return Interaction(
        request_id=f"chatcmpl-bench-{time.time_ns()}-{number}", tenant_id=tenant_id, key_id=key_id, created_at=datetime.now(UTC),
        messages=[{"role": "user", "content": PROMPT}], prompt_hash=b"-" * 32, answer="forty two", model="mock", tier="teacher",
        route="always-teacher", reason="measured", cache="miss", domain=None, given_domain=None, confidence=None, finish_reason="stop",
        prompt_tokens=10, completion_tokens=2, tokens_estimated=False, cost_microusd=45, latency_ms=3,
    )  # fmt: skip


def figures(rounds: Rounds) -> dict[str, Any]:
    """Medians of rounds with intervals, and the ratio of ours to each other one, round by round."""
    found: dict[str, Any] = {}
    for name, measured in rounds.items():
        mine: dict[str, Any] = {"rps": interval([r["rps"] for r in measured["c64"]])}
        for measure in (f"c{n}" for n in CONCURRENCY):
            for p in ("p50_ms", "p95_ms", "p99_ms"):
                added = [r[p] - d[p] for r, d in zip(measured[measure], rounds["direct"][measure], strict=True)]
                mine[f"added_{measure}_{p}"] = interval(added)
        mine["stream_rps"] = interval([r["rps"] for r in measured["stream"]])
        mine["stream_first_p50_ms"] = interval([r["first"]["p50_ms"] for r in measured["stream"]])
        mine["memory_mb"] = interval([r["mb"] for r in measured["memory"]])
        if "cached" in measured:
            mine["cached_rps"] = interval([r["rps"] for r in measured["cached"]])
            mine["cached_p95_ms"] = interval([r["p95_ms"] for r in measured["cached"]])
        mine["errors"] = sum(sum(r.get("errors", {}).values()) for results in measured.values() for r in results)
        found[name] = mine
    if OURS in rounds:
        for name in rounds.keys() - {OURS, "direct"}:
            pairs = zip(rounds[OURS]["c64"], rounds[name]["c64"], strict=True)
            found[OURS][f"rps_ratio_to_{name}"] = interval([ours["rps"] / theirs["rps"] for ours, theirs in pairs])
    return found


def interval(values: Sequence[float]) -> list[float]:
    """Median, and the 95 % percentile bootstrap interval of it (Efron 1979), 2,000 resamples."""
    array = np.array(values, float)
    resampled = np.median(np.random.default_rng(0).choice(array, (2000, len(array))), axis=1)
    return [float(np.median(array)), *map(float, np.percentile(resampled, [2.5, 97.5]))]


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = [
        "| system | version | requests/s, c=64 | added p50 c=1, ms | c=16 | c=64 | added p99 c=64 | streams/s c=16 | MB | errors |",
        "|" + "---|" * 10,
    ]
    for name, mine in report["figures"].items():
        cells = [
            _cell(mine[key])
            for key in ("rps", "added_c1_p50_ms", "added_c16_p50_ms", "added_c64_p50_ms", "added_c64_p99_ms", "stream_rps", "memory_mb")
        ]
        rows.append(f"| {name} | {report['systems'][name]['version']} | {' | '.join(cells)} | {mine['errors']} |")
    told = [f"Machine: {report['machine']}. Commit {report['commit']}, {report['date']}: `{report['command']}`.", ""]
    told += [
        "Medians of rounds [95 % bootstrap interval]; latency is what the gateway adds to a direct call. Peers run without governance.",
        "",
        *rows,
        "",
    ]
    ours = report["figures"].get(OURS, {})
    for key, value in ours.items():
        if key.startswith("rps_ratio_to_") or key.startswith("cached"):
            told.append(f"- {OURS} {key.replace('_', ' ')}: {_cell(value)}")
    if whole := report.get("cached_whole_machine"):
        rps, p95 = interval([r["rps"] for r in whole]), interval([r["p95_ms"] for r in whole])
        errors = sum(sum(r["errors"].values()) for r in whole)
        told.append(f"- cached, two workers on the whole machine, c=128: {_cell(rps)} requests/s, p95 {_cell(p95)} ms, {errors} errors")
    for key in ("commit_wait", "open_loop", "memory"):
        if key in report:
            told.append(f"- {key}: {json.dumps({k: v for k, v in report[key].items() if k != 'mb_by_minute'})}")
    told += [f"- {name}: not measured, {why}" for name, why in report["absent"].items()]
    told += ["", *(f"- {name}: {facts['settings']}" for name, facts in report["systems"].items())]
    return "\n".join(told) + "\n"


def plots(report: dict[str, Any], folder: Path) -> None:
    """Throughput with intervals, added latency by concurrency, and memory over time."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    shown = {name: mine for name, mine in report["figures"].items() if name != "direct"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    middles = [mine["rps"][0] for mine in shown.values()]
    low, high = ([abs(mine["rps"][n] - mine["rps"][0]) for mine in shown.values()] for n in (1, 2))
    left.barh(list(shown), middles, xerr=[low, high], color=["#2b6cb0" if "tutelage" in name else "#a0aec0" for name in shown])
    left.set_xlabel("requests a second, 64 connections, one core")
    for name, mine in shown.items():
        right.plot(CONCURRENCY, [max(1e-2, mine[f"added_c{n}_p50_ms"][0]) for n in CONCURRENCY], marker="o", label=name)
    right.set(xscale="log", yscale="log", xlabel="connections", ylabel="added median latency, ms")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "gateways.svg")
    if "memory" in report:
        figure, axes = plt.subplots(figsize=(6, 3))
        axes.plot(*np.array(report["memory"]["mb_by_minute"]).T)
        axes.set(xlabel="minutes under load", ylabel="MB", ylim=(0, None))
        figure.tight_layout()
        figure.savefig(folder / "memory.svg")


def machine() -> str:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()} of {sys.base_prefix}"
    return f"{os.cpu_count()} cores {cpu or platform.processor()}, {system}"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=CHECKOUT, check=False)
    return done.stdout.strip() or "unknown"


def _cell(value: Sequence[float]) -> str:
    return f"{value[0]:,.4g} [{value[1]:,.4g}, {value[2]:,.4g}]"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="such as tutelage-governed tensorzero (default: all)")
    parser.add_argument("--quick", action="store_true", help="one round of two seconds")
    parser.add_argument("--open-minutes", type=float, default=0, help="then 100 requests a second, open loop, and memory meanwhile")
    parser.add_argument("--out", type=Path, default=Path("benchmark-report"))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/tutelage-benchmarks", help="where peers are installed")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 2.0
    systems.pin(0, systems.OTHER_CORES)
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="tutelage-bench-") as folder:
        try:
            report = run(arguments, Path(folder), console)
        except KeyboardInterrupt:
            console.print("interrupted; everything that was started has been ended")
            return 130
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1))
    (arguments.out / "report.md").write_text(table(report))
    plots(report, arguments.out)
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
