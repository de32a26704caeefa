"""The gateways that are compared: how each is installed, started on a core of its own, asked and ended. Peers run as published, without
tenants, limits, a ledger or an audit; ours runs bare and fully governed. It refuses to know what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tutelage import operations
from tutelage.fleet import engines
from tutelage.fleet.local import gateway_command, prepare_encoder
from tutelage.settings import CHECKOUT, Home
from tutelage.stores.database import open_pool

READY_SECONDS = 90
LITELLM, PORTKEY, TENSORZERO = "1.104.0", "1.15.2", "2026.6.0"
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
GATEWAY_CORE, OTHER_CORES = (CORES[:1], CORES[1:]) if len(CORES) > 1 else (CORES, CORES)


class NotInstalled(Exception):
    """A peer that is not to be had here; the report says why."""


@dataclass
class Running:
    """A gateway that answers: where, with what headers, under which model name. `pids` are its own processes."""

    name: str
    url: str
    headers: dict[str, str]
    model: str
    version: str
    settings: str
    pids: list[int] = field(default_factory=list)
    database_url: str = ""

    def memory_mb(self) -> float:
        """Proportional set size of the gateway's processes."""
        return sum(_pss(process) for process in self.processes()) / 1e6

    def processes(self) -> list[psutil.Process]:
        """Its own processes and their children."""
        return [process for pid in self.pids for process in _family(pid)]


@contextmanager
def alone(target: Running, running: Sequence[Running]) -> Iterator[None]:
    """Every other gateway stopped for the length of a block: what one does when nobody asks it is not taken from another's core."""
    stopped = [process for other in running if other is not target for process in other.processes()]
    try:
        for one in stopped:
            one.suspend()
        yield
    finally:
        for one in stopped:
            with contextlib.suppress(psutil.Error):
                one.resume()


def pin(pid: int, cores: Sequence[int]) -> None:
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(pid, set(cores))


@contextmanager
def process(
    command: Sequence[str], log: Path, *, cores: Sequence[int], env: dict[str, str] | None = None, cwd: Path | None = None
) -> Iterator[int]:
    """A process with all its children, for the length of a block; its output goes to `log`."""
    with log.open("wb") as output:
        started = subprocess.Popen(
            list(command), stdout=output, stderr=output, env={**os.environ, **(env or {})}, cwd=cwd or CHECKOUT, start_new_session=True,
            preexec_fn=lambda: pin(0, cores),
        )  # fmt: skip
        try:
            yield started.pid
        finally:
            family = _family(started.pid)
            for signum, seconds in ((signal.SIGTERM, 8), (signal.SIGKILL, 5)):
                for one in family:
                    with contextlib.suppress(psutil.Error):
                        one.send_signal(signum)
                _, family = psutil.wait_procs(family, timeout=seconds)
            started.wait()


@contextmanager
def mock(folder: Path, *, record: bool = False) -> Iterator[str]:
    """The model behind every gateway; its URL, without /v1."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.mock", "--port", str(port), *(["--record"] if record else [])]
    with process(command, folder / "mock.log", cores=OTHER_CORES):
        _wait(f"http://127.0.0.1:{port}/v1/models", folder / "mock.log")
        yield f"http://127.0.0.1:{port}"


@contextmanager
def tutelage(
    folder: Path, upstream: str, *, name: str = "governed", workers: int = 1, cores: Sequence[int] = (), **settings: Any
) -> Iterator[Running]:
    """Ours, with PostgreSQL and Valkey of its own: on the other cores, or with the gateway on `cores`. `settings` go into gateway.yaml."""
    home, config = Home(folder / f"home-{name}"), folder / f"config-{name}"
    home.root.mkdir(parents=True, exist_ok=True)
    config.mkdir(exist_ok=True)
    price = {"input_per_mtok": 2.5, "output_per_mtok": 10.0}
    models = [{"name": "mock", "kind": "openai", "base_url": f"{upstream}/v1", "price": price}]
    models += [{**models[0], "name": f"mock-d{ms}", "base_url": f"{upstream}/d{ms}/v1", "model": "mock"} for ms in (20, 150)]
    (config / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    (config / "gateway.yaml").write_text(yaml.safe_dump(settings))
    if not (home.models / "encoder").exists():
        shared = folder / "encoder"
        prepare_encoder(shared)
        (home.models / "encoder").symlink_to(shared)
    started = engines.start(home)
    try:
        for found in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                if found.info["name"] in ("postgres", "valkey-server"):
                    pin(found.pid, cores or OTHER_CORES)
        made = asyncio.run(_tenant(started.database_url, home))
        port = free_port()
        command = gateway_command("127.0.0.1", port, workers, drain_seconds=1)  # as `tutelage serve` starts it
        multiproc = folder / f"metrics-{name}"
        shutil.rmtree(multiproc, ignore_errors=True)
        multiproc.mkdir()
        env = {
            "TUTELAGE_HOME": str(home.root), "TUTELAGE_CONFIG": str(config), "TUTELAGE_DATABASE_URL": started.database_url,
            "TUTELAGE_VALKEY_URL": started.valkey_url, "PROMETHEUS_MULTIPROC_DIR": str(multiproc), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with process(command, folder / f"{name}.log", cores=cores or GATEWAY_CORE, env=env) as pid:
            _wait(f"http://127.0.0.1:{port}/health/ready", folder / f"{name}.log")
            told = f"granian, {workers} worker; {json.dumps(settings) if settings else 'the default configuration'}"
            yield Running(
                f"tutelage-{name}",
                f"http://127.0.0.1:{port}",
                {"authorization": f"Bearer {made['key']}"},
                "mock",
                "this checkout",
                told,
                [pid],
                started.database_url,
            )
    finally:
        engines.stop(home)


async def _tenant(database_url: str, home: Home) -> dict[str, Any]:
    pool = await open_pool(database_url, size=1)
    try:
        return await operations.add_tenant(pool, home.secret("pepper"), name=f"bench-{time.time_ns()}", tier="enterprise")
    finally:
        await pool.close()


@contextmanager
def passthrough(folder: Path, upstream: str) -> Iterator[Running]:
    """The ceiling of our design: Granian and aiohttp, and nothing in between."""
    port = free_port()
    command = [sys.executable, "-m", "granian", "--interface", "asgi", "benchmarks.passthrough:app", "--loop", "uvloop", "--no-ws"]
    command += ["--http", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    with process(command, folder / "passthrough.log", cores=GATEWAY_CORE, env={"UPSTREAM": upstream}) as pid:
        _wait(f"http://127.0.0.1:{port}/v1/models", folder / "passthrough.log")
        yield Running(
            "passthrough", f"http://127.0.0.1:{port}", {}, "mock", importlib.metadata.version("granian"), "Granian + aiohttp", [pid]
        )


@contextmanager
def litellm(folder: Path, upstream: str, cache: Path) -> Iterator[Running]:
    python = _environment(cache / "litellm", f"litellm[proxy]=={LITELLM}")
    key, port, config = "sk-bench-0123456789abcdefABCDEF", free_port(), folder / "litellm.yaml"
    parameters = {"model": "openai/mock", "api_base": f"{upstream}/v1", "api_key": "none"}
    config.write_text(
        yaml.safe_dump({"model_list": [{"model_name": "mock", "litellm_params": parameters}], "general_settings": {"master_key": key}})
    )
    command = [
        str(python.parent / "litellm"),
        "--config",
        str(config),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--num_workers",
        "1",
        "--telemetry",
        "False",
    ]
    with process(command, folder / "litellm.log", cores=GATEWAY_CORE, cwd=folder, env={"LITELLM_LOG": "ERROR"}) as pid:
        _wait(f"http://127.0.0.1:{port}/health/liveliness", folder / "litellm.log")
        yield Running(
            "litellm",
            f"http://127.0.0.1:{port}",
            {"authorization": f"Bearer {key}"},
            "mock",
            LITELLM,
            "1 worker, no database, no cache",
            [pid],
        )


@contextmanager
def portkey(folder: Path, upstream: str, cache: Path) -> Iterator[Running]:
    home = cache / "portkey"
    entry = home / "node_modules/@portkey-ai/gateway/build/start-server.js"
    if not entry.exists():
        if shutil.which("npm") is None:
            raise NotInstalled("npm is not installed")
        home.mkdir(parents=True, exist_ok=True)
        _install(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(home), f"@portkey-ai/gateway@{PORTKEY}"])
    port = free_port()
    headers = {"x-portkey-provider": "openai", "authorization": "Bearer none", "x-portkey-custom-host": f"{upstream}/v1"}
    with process(["node", str(entry), f"--port={port}", "--headless"], folder / "portkey.log", cores=GATEWAY_CORE, cwd=home) as pid:
        _wait(f"http://127.0.0.1:{port}/", folder / "portkey.log")
        yield Running("portkey", f"http://127.0.0.1:{port}", headers, "mock", PORTKEY, "headless, no cache", [pid])


TENSORZERO_START = """
import sys, time
from tensorzero import tensorzero as rs
gateway = rs._start_http_gateway(config_file=sys.argv[1], clickhouse_url=None, postgres_url=None, valkey_url=None, async_setup=False)
print(gateway.base_url, flush=True)
while True: time.sleep(3600)
"""


@contextmanager
def tensorzero(folder: Path, upstream: str, cache: Path) -> Iterator[Running]:
    python, config, log = (
        _environment(cache / "tensorzero", f"tensorzero=={TENSORZERO}"),
        folder / "tensorzero.toml",
        folder / "tensorzero.log",
    )
    config.write_text(
        "[gateway]\nobservability.enabled = false\n[models.mock]\nrouting = ['mock']\n[models.mock.providers.mock]\ntype = 'openai'\n"
        f"model_name = 'mock'\napi_base = '{upstream}/v1/'\napi_key_location = 'none'\n"
        "[functions.f]\ntype = 'chat'\n[functions.f.variants.v]\ntype = 'chat_completion'\nmodel = 'mock'\n"
    )
    with process([str(python), "-c", TENSORZERO_START, str(config)], log, cores=GATEWAY_CORE, cwd=folder) as pid:
        deadline = time.monotonic() + READY_SECONDS
        while not (lines := [line for line in log.read_text(errors="replace").splitlines() if line.startswith("http://")]):
            if time.monotonic() > deadline or not psutil.pid_exists(pid):
                raise NotInstalled(f"it did not start: {log.read_text(errors='replace')[-300:]}")
            time.sleep(0.2)
        url = lines[0].split("/openai")[0] + "/openai"
        yield Running("tensorzero", url, {}, "tensorzero::function_name::f", TENSORZERO, "embedded HTTP gateway, observability off", [pid])


def starters(cache: Path) -> dict[str, Callable[[Path, str], Any]]:
    """Every system by its name."""
    return {
        # what is like is not looked for: every prompt of the load differs in a number only, and no peer does it
        "tutelage-governed": lambda folder, upstream: tutelage(folder, upstream, name="governed", semantic_cache=False),
        "tutelage-bare": lambda folder, upstream: tutelage(folder, upstream, name="bare", bare=True),
        "passthrough": passthrough,
        "litellm": lambda folder, upstream: litellm(folder, upstream, cache),
        "portkey": lambda folder, upstream: portkey(folder, upstream, cache),
        "tensorzero": lambda folder, upstream: tensorzero(folder, upstream, cache),
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _environment(folder: Path, requirement: str) -> Path:
    """The interpreter of a virtual environment that holds `requirement` and nothing of ours; it is of the same Python as ours."""
    python, installed = folder / "bin/python", folder / ".installed"
    ours = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    if not installed.exists() or installed.read_text() != str(ours):
        _install([sys.executable, "-m", "uv", "venv", "--quiet", "--clear", "--python", str(ours), str(folder)])
        _install([sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python), requirement])
        installed.write_text(str(ours))
    return python


def _install(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotInstalled(f"{' '.join(command[:4])} … failed: {(done.stderr or done.stdout).strip()[-300:]}")


def _wait(url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310 - our own
            if response.status < 500:
                return
        time.sleep(0.2)
    raise NotInstalled(f"it did not become ready in {READY_SECONDS} s: {log.read_text(errors='replace')[-300:]}")


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def _pss(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error, AttributeError):
        return int(process.memory_full_info().pss)
    return 0
