"""One machine: start everything a home needs as processes, keep it running, end it in order.

It refuses to know what the processes answer; it only knows how each is started and when it is ready.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType

import httpx

from tutelage.errors import BackendFailed, ConfigInvalid, EngineFailed, TutelageError
from tutelage.evolution.gaps import EvolveSettings
from tutelage.evolution.promotion import PromotionSettings
from tutelage.evolution.rollout import RolloutSettings
from tutelage.evolution.watch import WatchSettings
from tutelage.fleet import engines, processes, tiers
from tutelage.settings import CHECKOUT, GatewaySettings, Home, ModelsSettings, RoutingSettings, TierSettings, load
from tutelage.stores import registry
from tutelage.stores.database import open_pool

log = logging.getLogger(__name__)
Say = Callable[[str], None]

READY_SECONDS = 180.0
LOOK_SECONDS = 1.0
RECONCILE_SECONDS = 2.0
BASE = "smollm2-135m-instruct"


def prepare_models(home: Home, say: Say) -> None:
    """Make the encoder and the default base from the packaged weights, once a home; nothing is downloaded."""
    if not (home.models / "encoder/model.onnx").exists():
        say("preparing the encoder from its packaged weights (once)")
        prepare_encoder(home.models / "encoder", environment=home.environment())
    if not (home.models / f"{BASE}/config.json").exists():
        say("preparing the base from its packaged weights (once)")
        _prepare("base", "inference.base", home.models, home.environment())


def prepare_encoder(out: Path, *, environment: Mapping[str, str] | None = None) -> None:
    """Make the encoder's model in `out` unless it is there. Raises EngineFailed."""
    if not (out / "model.onnx").exists():
        _prepare("encoder", "inference.encoder_export", out, environment or {})


def _prepare(name: str, module: str, out: Path, environment: Mapping[str, str]) -> None:
    command = processes.python("-m", module, "--out", str(out))
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    # its output is quoted when it fails; it is ended with us because it shares our terminal's process group
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineFailed(f"preparing the {name} failed: {done.stderr.strip()[-600:]}")


class Local(AbstractContextManager["Local"]):
    """The running processes of one home. Entering starts what is missing, leaving ends all of it."""

    def __init__(
        self, home: Home, *, config_dir: Path, host: str, port: int, workers: int, say: Say = log.info, unattended: bool = False
    ) -> None:
        """`unattended`: cycles begin by themselves when they are due (evolve.yaml)."""
        self._beside = ("watch", "review", *(("timer",) if unattended else ()))
        self.home, self.config_dir, self.host, self.port, self.workers, self._say = home, config_dir, host, port, workers, say
        self.tier, self.gateway = load(TierSettings, config_dir), load(GatewaySettings, config_dir)
        for kind in (RoutingSettings, ModelsSettings, EvolveSettings, PromotionSettings, RolloutSettings, WatchSettings):
            load(kind, config_dir)  # every fault of the configuration is told before anything is started
        self.url = f"http://{host}:{port}"
        self.tier_url = f"http://127.0.0.1:{self.tier.port}"
        self._engines: engines.Engines | None = None
        self._control = tiers.TierControl(self.tier_url, home.secret("tier_token"))

    def __enter__(self) -> Local:
        other = processes.find(self.home, "serve")
        if other is not None and other.pid != os.getpid():
            raise ConfigInvalid(f"{self.home.root} is being served by process {other.pid}; end it first with: tutelage stop")
        stop_all(self.home, but_not=os.getpid())
        processes.claim(self.home, "serve")
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    @property
    def engines(self) -> engines.Engines:
        if self._engines is None:
            raise EngineFailed("the embedded servers are not started; enter the context first")
        return self._engines

    def _start(self) -> None:
        prepare_models(self.home, self._say)
        self._say("starting PostgreSQL and Valkey")
        self._engines = engines.start(self.home)
        self._say("starting the tier and the gateway")
        self._start_tier()
        self._start_gateway()
        for name in self._beside:
            self._start_beside(name)
        self._wait("gateway", lambda: _healthy(f"{self.url}/health/ready"))
        self._wait("tier", self._control.ready)
        self.reconcile()

    def _stop(self) -> None:
        for name in self._beside:
            processes.stop(self.home, name)
        processes.stop(self.home, "gateway", grace=self.gateway.drain_seconds + processes.GRACE_SECONDS)
        processes.stop(self.home, "tier")
        engines.stop(self.home)
        self._control.close()
        processes.release(self.home, "serve")

    def _start_tier(self) -> None:
        threads = self.tier.threads or os.cpu_count() or 1
        environment = {
            "TUTELAGE_BASE_DIR": str(self.home.models / BASE),
            "TUTELAGE_STUDENTS_DIR": str(self.home.students),
            "TUTELAGE_TIER_TOKEN": self.home.secret("tier_token"),
            "TUTELAGE_TIER_THREADS": str(threads),
            "TUTELAGE_TIER_MAX_BATCH": str(self.tier.max_batch),
            "OMP_NUM_THREADS": str(threads),
            # Threads that spin long while they wait take the gateway's core, threads that never spin wake up late: on two cores
            # 4.9 answers a second with this, 3.2 without spinning (120 requests, 16 at once). A training has the machine to itself.
            "GOMP_SPINCOUNT": "2000",
            "PYTHONPATH": str(CHECKOUT),
        }
        serve = processes.python("-m", "bentoml", "serve", "bentos.tier.service:Tier", "--host", "127.0.0.1", "--port", str(self.tier.port))
        processes.start(self.home, "tier", serve, environment=environment)

    def _start_gateway(self) -> None:
        multiproc = self.home.run / "metrics"
        shutil.rmtree(multiproc, ignore_errors=True)
        multiproc.mkdir(parents=True)
        environment = {
            "TUTELAGE_CONFIG": str(self.config_dir),
            "TUTELAGE_DATABASE_URL": self.engines.database_url,
            "TUTELAGE_VALKEY_URL": self.engines.valkey_url,
            "TUTELAGE_TIER_URL": self.tier_url,
            "PROMETHEUS_MULTIPROC_DIR": str(multiproc),
            "OMP_NUM_THREADS": "1",
        }
        serve = gateway_command(self.host, self.port, self.workers, drain_seconds=self.gateway.drain_seconds)
        processes.start(self.home, "gateway", serve, environment=environment)

    def _start_beside(self, name: str) -> None:
        """One of the small processes that look at the database every so often: watch, review, timer."""
        command = processes.python("-m", f"flows.{name}", "--config", str(self.config_dir))
        environment = {"TUTELAGE_HOME": str(self.home.root), "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
        processes.start(self.home, name, command, environment=environment)

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not ready():
            if processes.find(self.home, name) is None:
                raise EngineFailed(f"the {name} ended while starting; read {self.home.logs / f'{name}.log'}")
            if time.monotonic() > deadline:
                raise EngineFailed(f"the {name} is not ready after {READY_SECONDS:.0f} s; read {self.home.logs / f'{name}.log'}")
            time.sleep(0.2)

    def reconcile(self) -> None:
        """Bring the tier to the adapters that the promotion ledger names."""
        try:
            for fault in tiers.reconcile(self._control, asyncio.run(_wanted(self.engines.database_url))):
                log.warning("%s", fault)
        except (BackendFailed, OSError) as failed:
            log.warning("adapters not reconciled, trying again: %s", failed)

    def watch(self) -> None:
        """Restart what dies and keep the tier's adapters right, until interrupted."""
        reconciled = time.monotonic()
        while True:
            time.sleep(LOOK_SECONDS)
            self.look()
            if time.monotonic() - reconciled >= RECONCILE_SECONDS:
                self.reconcile()
                reconciled = time.monotonic()

    def look(self) -> None:
        """Restart what has died. Nothing acknowledged is lost by it: answers are recorded before they are given."""
        try:
            if "TUTELAGE_DATABASE_URL" not in os.environ and not engines.running_database(self.home):
                self._say("PostgreSQL ended; starting it again")
                engines.start_database(self.home)
            if "TUTELAGE_VALKEY_URL" not in os.environ and processes.find(self.home, "valkey") is None:
                self._say("Valkey ended; starting it again")
                engines.start_valkey(self.home)
            starts = {"tier": self._start_tier, "gateway": self._start_gateway}
            starts |= {name: partial(self._start_beside, name) for name in self._beside}
            for name, start in starts.items():
                if processes.find(self.home, name) is None:
                    self._say(f"the {name} ended; starting it again")
                    start()
        except TutelageError as failed:
            log.warning("restart failed, trying again: %s", failed)


def gateway_command(host: str, port: int, workers: int, *, drain_seconds: float) -> list[str]:
    """The command line of a gateway: one process that starts its workers, and those again that die."""
    serve = processes.python("-m", "granian", "--interface", "asgi", "--factory", "tutelage.gateway.app:create", "--loop", "uvloop")
    serve += ["--host", host, "--port", str(port), "--workers", str(workers), "--respawn-failed-workers"]
    # streams may finish while a worker drains; a client that sends its head slower than this is cut off
    # HTTP/2 is for whoever ends TLS before us: the server's deadline for heads holds for HTTP/1 alone
    serve += ["--http", "1", "--no-ws", "--log-level", "warning", "--workers-kill-timeout", str(round(drain_seconds) + 5)]
    return [*serve, "--http1-header-read-timeout", "10000", "--backlog", "4096", "--backpressure", "4096"]


def stop_all(home: Home, *, but_not: int | None = None) -> list[str]:
    """End every process of this home, embedded servers last; the names of what was running."""
    ended = []
    for name in sorted(processes.names(home), key=lambda n: (n == "valkey", n != "serve", n)):
        process = processes.find(home, name)
        if process is not None and process.pid == but_not:
            continue
        if processes.stop(home, name):
            ended.append(name)
    if engines.running_database(home):
        engines.stop(home)
        ended.append("postgres")
    return ended


async def _wanted(database_url: str) -> list[tiers.Wanted]:
    pool = await open_pool(database_url, size=1)
    try:
        held = [(c.adapter, c.path, c.digest) for c in await registry.champions(pool)] + await registry.standby(pool)
        wanted = [tiers.Wanted(name, str(Path(path) / "adapter"), digest) for name, path, digest in dict.fromkeys(held)]
        fresh = [tiers.Wanted(s.adapter, str(Path(s.path) / registry.FRESH), s.digest) for s in await registry.spawned(pool)]
        return wanted + fresh
    finally:
        await pool.close()


def _healthy(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2).status_code == 200
    return False
