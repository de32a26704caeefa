"""The Prefect and MLflow web pages of one home: start or find them. It refuses to know what they show."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from tutelage.errors import EngineFailed
from tutelage.fleet import processes
from tutelage.settings import CHECKOUT, Home

READY_SECONDS = 180.0
WORKER = "prefect-worker"


def start(home: Home, *, config_dir: Path) -> dict[str, str]:
    """URLs by name; beside Prefect's server runs the worker of its deployments. Raises EngineFailed when one does not come up."""
    ports = {"prefect": _port(4200), "mlflow": _port(5000)}
    store = home.environment()["MLFLOW_TRACKING_URI"]
    commands = {
        "prefect": ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(ports["prefect"])],
        "mlflow": ["-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(ports["mlflow"])],
    }
    commands["mlflow"] += ["--workers", "1", "--artifacts-destination", str(home.root / "mlflow" / "artifacts")]
    paths = {"prefect": "/api/health", "mlflow": "/health"}
    urls = {}
    for name, arguments in commands.items():
        urls[name] = running(home, name) or _begin(home, name, arguments, ports[name])
    for name, url in urls.items():
        _wait(home, name, url + paths[name])
    if processes.find(home, WORKER) is None:
        begin_worker(home, urls["prefect"], config_dir=config_dir)
    return urls


def begin_worker(home: Home, prefect_url: str, *, config_dir: Path) -> None:
    """Start what registers the deployments and carries them out, one at a time, behind everything that answers requests."""
    environment = {
        "PREFECT_API_URL": f"{prefect_url}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # of a run: one that is silent for longer is shown as crashed
        "TUTELAGE_CONFIG": str(config_dir),
        "PYTHONPATH": str(CHECKOUT),
        "OMP_NUM_THREADS": "1",
    }
    command = processes.python("-m", "flows.deployments", "--config", str(config_dir))
    processes.start(home, WORKER, ["nice", "-n", "10", *command], environment=environment)


def running(home: Home, name: str) -> str | None:
    """The URL of a page that runs already."""
    process = processes.find(home, f"ui-{name}")
    if process is None:
        return None
    command = process.cmdline()
    return f"http://127.0.0.1:{command[command.index('--port') + 1]}"


def prefect_api(home: Home) -> str | None:
    """Where cycles may be asked for: this home's Prefect server, while the worker that carries them out runs too."""
    url = running(home, "prefect")
    return f"{url}/api" if url and processes.find(home, WORKER) else None


def _begin(home: Home, name: str, arguments: Sequence[str], port: int) -> str:
    processes.start(home, f"ui-{name}", processes.python(*arguments))
    return f"http://127.0.0.1:{port}"


def _wait(home: Home, name: str, url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2).status_code == 200:
                return
        if processes.find(home, f"ui-{name}") is None or time.monotonic() > deadline:
            raise EngineFailed(f"the {name} UI did not start; read {home.logs / f'ui-{name}.log'}")
        time.sleep(0.5)


def _port(usual: int) -> int:
    """The usual port, or any free one when it is taken."""
    for port in (usual, 0):
        with socket.socket() as probe, suppress(OSError):
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise EngineFailed("no free port on 127.0.0.1")
