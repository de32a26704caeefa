"""Gateways on the same PostgreSQL and Valkey, as `tutelage serve` starts them: for what must hold while they are killed and started again.

It refuses to know what is asked of them.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.systems import free_port
from tutelage.fleet.engines import Engines
from tutelage.fleet.local import gateway_command
from tutelage.gateway import keys
from tutelage.operations import add_tenant
from tutelage.records import Key
from tutelage.settings import CHECKOUT, Home
from tutelage.stores import tenants
from tutelage.stores.database import open_pool

READY_SECONDS = 90.0
PRICE = {"input_per_mtok": 2.5, "output_per_mtok": 10.0}
WAYS = {
    "mock": "",
    "mock-d20": "/d20",
    "mock-d150": "/d150",
    "mock-d1000": "/d1000",
    "mock-d60000": "/d60000",
    "mock-p50": "/p50",
}  # delays, and pauses between chunks, in ms


@dataclass(frozen=True)
class Site:
    """What replicas share: a home with its secrets and the encoder, a configuration folder and the stores."""

    home: Home
    config: Path
    stores: Engines

    def configure(self, upstream: str, **gateway: Any) -> None:
        """Write models.yaml with the mock at `upstream` under the names of WAYS, and gateway.yaml."""
        mock = {"kind": "openai", "model": "mock", "price": PRICE}
        models = [{**mock, "name": name, "base_url": f"{upstream}{way}/v1"} for name, way in WAYS.items()]
        (self.config / "models.yaml").write_text(yaml.safe_dump({"models": models}))
        (self.config / "gateway.yaml").write_text(yaml.safe_dump(gateway))


@dataclass(frozen=True)
class Party:
    """A tenant and the texts of keys: of its traffic, of its administrator, of an operator."""

    tenant_id: str
    key: str
    administrator: str
    operator: str


async def enroll(site: Site, name: str, *, tier: str = "enterprise", **limits: int) -> Party:
    """A new tenant with what was agreed beside its plan, and an operator."""
    pool, pepper = await open_pool(site.stores.database_url, size=1), site.home.secret("pepper")
    try:
        made = await add_tenant(pool, pepper, name=name, tier=tier)
        if limits:
            await tenants.change_tenant(pool, made["tenant_id"], "limits", limits)
        minted = [keys.mint(pepper), keys.mint(pepper)]
        for one, tenant_id in zip(minted, (made["tenant_id"], None), strict=True):
            await tenants.add_key(pool, Key(one.id, tenant_id, "admin", one.hash, None, None))
    finally:
        await pool.close()
    return Party(made["tenant_id"], made["key"], minted[0].text, minted[1].text)


class Replica:
    """One gateway with its workers, on a port of its own that it keeps when it is started again."""

    def __init__(self, site: Site, *, workers: int = 1, drain_seconds: float = 20.0, **environment: str) -> None:
        self._site, self._workers, self._drain = site, workers, drain_seconds
        self._environment = environment
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}"
        self.log = site.home.logs / f"gateway-{self._port}.log"

    def start(self) -> None:
        """Returns before it is ready."""
        metrics = self._site.home.run / f"metrics-{self._port}"
        shutil.rmtree(metrics, ignore_errors=True)
        metrics.mkdir()
        environment = {
            "TUTELAGE_HOME": str(self._site.home.root), "TUTELAGE_CONFIG": str(self._site.config), "OMP_NUM_THREADS": "1",
            "TUTELAGE_DATABASE_URL": self._site.stores.database_url, "TUTELAGE_VALKEY_URL": self._site.stores.valkey_url,
            "PROMETHEUS_MULTIPROC_DIR": str(metrics), "PYTHONPATH": str(CHECKOUT), **self._environment,
        }  # fmt: skip
        command = gateway_command("127.0.0.1", self._port, self._workers, drain_seconds=self._drain)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=CHECKOUT, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was not started"
        return self._process.pid

    def workers(self) -> list[psutil.Process]:
        """The processes that answer; multiprocessing's own resource tracker is none."""
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.pid).children()
            return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        return []

    def wait(self, *, key: str | None = None) -> None:
        """Until all its workers answer, and know `key` if one is given. If it ended, it is started again: so does `tutelage serve`, and
        granian ends by itself when a worker dies within seconds of its start. Raises RuntimeError with the end of its log."""
        request = urllib.request.Request(f"{self.url}{'/v1/models' if key else '/health/ready'}")  # noqa: S310 - our own
        if key:
            request.add_header("authorization", f"Bearer {key}")
        deadline, seen = time.monotonic() + READY_SECONDS, 0
        while seen < 8 * self._workers:  # each on a connection of its own: workers take them by chance
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.url} is not ready after {READY_SECONDS:g} s: {self.log.read_text(errors='replace')[-800:]}")
            self.mind()
            if _answers(request):
                seen += 1
            else:
                seen = 0
                time.sleep(0.1)

    def mind(self) -> bool:
        """Start it again if it ended; whether it had not."""
        ended = self._process is not None and self._process.poll() is not None
        if ended:
            self.start()
        return not ended

    def answers(self) -> bool:
        """Whether one of its workers says now that it is ready."""
        return _answers(urllib.request.Request(f"{self.url}/health/ready"))  # noqa: S310 - our own

    def memory(self) -> int:
        """Bytes of resident memory, of all its processes."""
        return sum(process.memory_info().rss for process in [psutil.Process(self.pid), *self.workers()])

    def kill(self) -> None:
        """SIGKILL to all of it at once."""
        family = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        assert self._process is not None
        self._process.wait()

    def kill_first(self) -> None:
        """SIGKILL to the process that was started, and to nothing that it started itself."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def terminate(self) -> None:
        """SIGTERM, as a service manager sends it; returns at once."""
        os.kill(self.pid, signal.SIGTERM)

    def stop(self) -> None:
        """However it is left, none of its processes stays."""
        if self._process is None or self._process.poll() is not None:
            return
        family = psutil.Process(self.pid).children(recursive=True)
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(8)
        with contextlib.suppress(psutil.Error):
            self.kill()
        for left in family:
            with contextlib.suppress(psutil.Error):
                left.kill()


def _answers(request: urllib.request.Request) -> bool:
    try:
        with urllib.request.urlopen(request, timeout=2) as response:  # noqa: S310 - our own
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


@contextmanager
def running(site: Site, *, replicas: int, workers: int = 1, **settings: Any) -> Iterator[Sequence[Replica]]:
    """So many replicas, ready, for the length of a block."""
    with ExitStack() as stack:
        made = [Replica(site, workers=workers, **settings) for _ in range(replicas)]
        for one in made:
            one.start()
            stack.callback(one.stop)
        for one in made:
            one.wait()
        yield made
