"""The ASGI app of one gateway worker: the one place where its parts are wired together. It refuses to hold any rule."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import asyncpg

from tutelage import __version__
from tutelage.errors import Unavailable
from tutelage.fleet import backends
from tutelage.fleet.endpoint import Deadlines, Endpoint
from tutelage.gateway import admin, bare, configuration, endpoints, summary, wire
from tutelage.gateway.admission import Admission, Estimate, Lost, Party, Used
from tutelage.gateway.cache import Cache
from tutelage.gateway.callers import Callers
from tutelage.gateway.configuration import Configuration, ConfigurationWatcher
from tutelage.gateway.dispatch import Dispatch
from tutelage.gateway.draining import Draining
from tutelage.gateway.embeddings import Embeddings
from tutelage.gateway.estimators import Estimators
from tutelage.gateway.gauges import Gauges
from tutelage.gateway.idempotency import Idempotency
from tutelage.gateway.judging import Judging
from tutelage.gateway.models import Models
from tutelage.gateway.pipeline import Pipeline
from tutelage.gateway.planning import Planning
from tutelage.gateway.recalling import Recalling
from tutelage.gateway.recording import Recording, utc_now
from tutelage.gateway.semantic import Semantic
from tutelage.gateway.shadows import Shadows
from tutelage.gateway.snapshot import Watcher
from tutelage.gateway.storage import StorageWatcher
from tutelage.gateway.turns import Turns
from tutelage.gateway.verifying import Verifying
from tutelage.routing.encoder import Encoder
from tutelage.settings import Home, ModelEntry, ModelsSettings, RoutingSettings
from tutelage.stores.bodies import Sweeper
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.heads import HeadsExporter, HeadsFile
from tutelage.stores.interactions import Recorder, add_lost, used
from tutelage.telemetry import Metrics, log_to_stderr, spans_from_environment

log = logging.getLogger(__name__)

SERVING_SECONDS = 1.0  # after which the server has started its threads
COLLECT = (5_000, 20, 100)  # objects before a look for cycles: a request makes hundreds, and hardly any; the default looks once a request


def create() -> wire.Gateway:
    """The app as a server process starts it; everything comes from the environment set by `tutelage serve`."""
    log_to_stderr()
    _reschedule("SCHED_OTHER", "SCHED_BATCH")
    home = Home.from_environment()
    return build(
        home,
        config_dir=home.config_dir(),
        database_url=os.environ["TUTELAGE_DATABASE_URL"],
        valkey_url=os.environ["TUTELAGE_VALKEY_URL"],
        tier_url=os.environ.get("TUTELAGE_TIER_URL"),
        own_process=True,
    )


def _reschedule(now: str, then: str) -> None:
    """How this thread, and every thread that it starts from now on, is scheduled where the system knows it (Linux).

    The server's threads start while this one is SCHED_BATCH: on a core that they share with ours they then take their turn where they
    would break in three times a request. Ours goes back to what is usual. A class that somebody else chose stays.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    with suppress(OSError):  # a sandbox may forbid it: slower, and no worse
        if os.sched_getscheduler(0) == getattr(os, now):
            os.sched_setscheduler(0, getattr(os, then), os.sched_param(0))


@dataclass(frozen=True)
class Setup:
    """Where a gateway worker's state, its configuration and its neighbours are."""

    home: Home
    config_dir: Path
    database_url: str
    valkey_url: str
    tier_url: str | None
    over: Mapping[str, Any]
    own_process: bool
    started_with: Configuration


def build(
    home: Home,
    *,
    config_dir: Path,
    database_url: str,
    valkey_url: str,
    tier_url: str | None,
    over: Mapping[str, Any] = MappingProxyType({}),
    own_process: bool = False,
) -> wire.Gateway:
    """The app of one gateway worker; what it needs is opened when it starts and closed when it stops. `over` stands above what
    gateway.yaml says; `own_process`: it may watch over the process that it runs in. Raises ConfigInvalid."""
    started_with = configuration.read(config_dir, now=datetime.now(UTC), over=over)
    setup = Setup(home, config_dir, database_url, valkey_url, tier_url, over, own_process, started_with)
    app = wire.Gateway(
        title="Tutelage", version=__version__, lifespan=partial(_open, setup=setup), docs_url=None, redoc_url=None, redirect_slashes=False
    )  # a redirect would go wherever the request's Host header says
    app.state.metrics = Metrics()
    wire.answer_errors(app, app.state.metrics)
    endpoints.add_routes(app)
    admin.add_routes(app)
    return app


@asynccontextmanager
async def _open(app: wire.Gateway, *, setup: Setup) -> AsyncIterator[None]:
    """Open what a worker needs, in order; it is closed in reverse, so that what others use is closed after them."""
    state, settings, pepper = app.state, setup.started_with.gateway, setup.home.secret("pepper")
    async with AsyncExitStack() as opened:
        state.pool = pool = await open_pool(setup.database_url)
        opened.push_async_callback(pool.close)
        spans = spans_from_environment()
        opened.callback(spans.close)
        encoder = Encoder(setup.home.models / "encoder", threads=1)
        clients = Clients(setup, encoder.count_tokens)
        opened.push_async_callback(clients.close)
        cache, admission, recorder = _governance(setup, pool)
        for closing in (cache.close, admission.close, recorder.stop):
            opened.push_async_callback(closing)
        state.turns = Turns(most_running=settings.most_running, most_waiting=settings.most_waiting, wait_seconds=settings.wait_seconds)
        state.watcher = _watcher(pool, state, settings.snapshot_seconds)
        state.callers = Callers(state.watcher, pepper=pepper)
        state.idempotency = Idempotency(pool, lease_seconds=settings.idempotency_lease_seconds)
        changed = _routing(setup, state, clients, encoder, recorder)
        state.configuration = ConfigurationWatcher(
            setup.config_dir, seconds=settings.configuration_seconds, changed=changed, over=setup.over
        )
        state.semantic = _semantic(setup, state, cache, encoder)
        state.pipeline = Pipeline(
            watcher=state.watcher,
            cache=cache,
            semantic=state.semantic,
            admission=admission,
            turns=state.turns,
            dispatch=state.dispatch,
            recording=Recording(recorder, metrics=state.metrics, spans=spans),
            shadows=state.shadows,
            encoder=encoder,
            settings=lambda: state.configuration.current.gateway,
            secret=pepper,
        )
        opened.push_async_callback(state.pipeline.close)
        state.draining = Draining(grace_seconds=settings.drain_seconds, cut=state.pipeline.cut_streams)
        core_hour = setup.started_with.tier.core_hour_usd
        state.embeddings = Embeddings(encoder, admission=admission, recorder=recorder, metrics=state.metrics, core_hour_usd=core_hour)
        # reports and checks of chains have connections of their own, so that they hold up nothing that a request needs
        state.admin_pool = await open_pool(setup.database_url, size=2)
        opened.push_async_callback(state.admin_pool.close)
        state.config_dir, state.pepper, state.has_tier = setup.config_dir, pepper, setup.tier_url is not None
        if setup.own_process:
            state.draining.listen()
        recorder.start()
        beside = (state.watcher, state.idempotency, state.configuration, *_background(setup, state))
        for part in (admission, *beside):
            await part.start()
        for part in beside:
            opened.push_async_callback(part.stop)
        if setup.own_process:
            gc.freeze()  # what a worker starts with stays: no collection needs to look through it again
            gc.set_threshold(*COLLECT)
            asyncio.get_running_loop().call_later(SERVING_SECONDS, _reschedule, "SCHED_BATCH", "SCHED_OTHER")
        yield


def _watcher(pool: Pool, state: Any, seconds: float) -> Watcher:
    """Students are held against what the teachers say, who err too. Where a judge says who was right, nothing is made of that."""

    def measures() -> list[str]:
        current = state.configuration.current
        return [] if current.routing.judge else [entry.name for entry in current.models.models if entry.tier == "teacher"]

    return Watcher(pool, seconds=seconds, routing=lambda: state.configuration.current.routing, teachers=measures)


def _routing(setup: Setup, state: Any, clients: Clients, encoder: Encoder, recorder: Recorder) -> Callable[[Configuration], None]:
    """Who is asked, and what becomes of the answers: `dispatch`, `recalling`, `shadows` of the state. What a changed configuration is told
    to is returned."""
    models, routing, randomness = clients.models(setup.started_with.models), setup.started_with.routing, random.Random()

    def current() -> RoutingSettings:
        found: RoutingSettings = state.configuration.current.routing
        return found

    state.estimators = {}
    judging = Judging(models, routing)
    state.recalling = Recalling(state.pool, current, state.watcher.erasures)
    planning = Planning(routing, estimators=state.estimators, randomness=randomness)
    dispatch = Dispatch(encoder, models=models, planning=planning, judging=judging, recalling=state.recalling, metrics=state.metrics)
    verifying = Verifying(state.pool, routing=current)
    state.dispatch = dispatch
    state.shadows = (
        bare.NoShadows()
        if setup.started_with.gateway.bare
        else Shadows(state.pool, recorder, dispatch, judging, verifying, routing=current, randomness=randomness, clock=utc_now)
    )

    def changed(new: Configuration) -> None:
        models = clients.models(new.models)
        judging.change(models, new.routing)
        dispatch.change(models, new.routing)
        state.turns.change(most_running=new.gateway.most_running, wait_seconds=new.gateway.wait_seconds)
        state.watcher.read_again()

    return changed


def _semantic(setup: Setup, state: Any, cache: Cache, encoder: Encoder) -> Semantic:
    return Semantic(
        cache,
        encoder,
        state.pool,
        metrics=state.metrics,
        secret=setup.home.secret("pepper").encode(),
        settings=lambda: state.configuration.current.gateway,
        tenants=setup.started_with.gateway.semantic_tenants,
        erasures=state.watcher.erasures,
        judge=state.shadows.as_good,
    )


def _background(setup: Setup, state: Any) -> tuple[Any, ...]:
    """What a worker does every so often beside its requests, and what /metrics asks of it."""
    settings = setup.started_with.gateway
    state.heads = HeadsFile.of(setup.home)
    evolved = summary.Evolved(state.admin_pool, seconds=settings.storage_seconds)
    state.metrics.summaries = [summary.derived, evolved.families]
    return (
        evolved,
        Gauges(state, seconds=settings.gauge_seconds),
        StorageWatcher(state.pool, state.watcher, seconds=settings.storage_seconds),
        Estimators(state.pool, state.estimators, seconds=settings.estimates_seconds),
        state.recalling,
        HeadsExporter(state.pool, state.heads, seconds=settings.heads_seconds),
        Sweeper(state.pool, seconds=settings.sweep_seconds),
        state.semantic,
    )


class Clients:
    """Clients of the models: an entry of models.yaml that stays as it is keeps its connections and what is known of its health."""

    def __init__(self, setup: Setup, count_tokens: Callable[[str], int]) -> None:
        self._count = count_tokens
        self._built: dict[ModelEntry, backends.Backend] = {}
        self._closing: list[asyncio.Task[None]] = []
        tier = setup.started_with.tier
        local = Endpoint(
            "tier",
            [f"{setup.tier_url or 'http://127.0.0.1:9'}/v1"],
            headers={},
            deadlines=Deadlines(total=tier.timeout_seconds),
            connections=1000,
            refusal=partial(backends.refused, "of the tier"),
            shared=True,
        )
        self._local, self._core_hour = local, tier.core_hour_usd

    def models(self, configured: ModelsSettings) -> Models:
        """The configured backends, and a client of the local tier for any adapter name. Raises ConfigInvalid."""
        built = {entry: self._built.get(entry) or backends.build(entry, count_tokens=self._count) for entry in configured.models}
        for entry, backend in self._built.items():
            if entry not in built:  # calls under way have until their own deadline
                self._closing.append(asyncio.create_task(_close_later(backend, entry.timeout_seconds)))
        self._built = built
        return Models(tuple(built.items()), self._adapter)

    def _adapter(self, name: str) -> backends.Backend:
        return backends.OpenAIBackend(name, self._local, model=name, price=None, count_tokens=self._count, core_hour_usd=self._core_hour)

    async def close(self) -> None:
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        for backend in self._built.values():
            await backend.close()
        await self._local.close()


async def _close_later(backend: backends.Backend, seconds: float) -> None:
    try:
        await asyncio.sleep(seconds)
    finally:
        await backend.close()


def _governance(setup: Setup, pool: Pool) -> tuple[Cache, Admission, Recorder]:
    settings = setup.started_with.gateway
    if settings.bare:
        log.warning("bare: true in gateway.yaml: nothing is limited, cached or recorded; this is for measuring only")
        return bare.NoCache(), bare.NoLimits(), bare.NoLedger()
    return (
        Cache(
            setup.valkey_url,
            secret=setup.home.secret("pepper").encode(),
            deadline_seconds=settings.cache_deadline_seconds,
            worker_bytes=settings.cache_worker_bytes,
            tenant_bytes=settings.cache_tenant_bytes,
            total_bytes=settings.cache_total_bytes,
        ),
        Admission(
            setup.valkey_url,
            used=partial(_used, pool),
            lost=partial(_settle_lost, pool),
            deadline_seconds=settings.admission_deadline_seconds,
            slot_seconds=settings.slot_seconds,
        ),
        Recorder(
            pool,
            flush_seconds=settings.record_flush_seconds,
            batch_rows=settings.record_batch_rows,
            deadline_seconds=settings.record_deadline_seconds,
        ),
    )


async def _used(pool: Pool, party: Party, now: datetime) -> Used:
    """What the ledger says. Raises Unavailable: without it nobody knows what is left."""
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    try:
        return Used(*await used(pool, party.tenant_id, party.id if party.scope == "key" else None, day=day, month=day.replace(day=1)))
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as broken:
        raise Unavailable("how much of the limits is used cannot be looked up; try again shortly") from broken


async def _settle_lost(pool: Pool, lost: Lost) -> Estimate:
    """Bill a request whose worker died at what it had reserved, unless its interaction was recorded before; what is on the bill."""
    return Estimate(
        *await add_lost(
            pool,
            request_id=lost.request_id,
            tenant_id=lost.tenant_id,
            key_id=lost.key_id,
            at=lost.at,
            tokens=lost.reserved.tokens,
            cost_microusd=lost.reserved.cost_microusd,
        )
    )
