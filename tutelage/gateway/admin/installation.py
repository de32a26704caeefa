"""/admin/v1/backends and /admin/v1/config: how this worker sees its models, and what it runs on. It tells no secret."""

from __future__ import annotations

import os
from dataclasses import asdict

from tutelage import __version__
from tutelage.fleet.endpoint import ReplicaHealth
from tutelage.gateway.admin import shapes
from tutelage.gateway.admin.door import Call, Route
from tutelage.gateway.configuration import Configuration
from tutelage.gateway.gauges import callable_now
from tutelage.settings import ModelEntry


async def backends(call: Call) -> shapes.Backends:
    """The models behind this worker: which replicas may be called, which are left alone, and why."""
    models = call.state.dispatch.models
    shown = [_backend(entry, backend.health()) for entry, backend in models.configured]
    if call.state.has_tier:
        local = ModelEntry(name="tier", tier="student", kind="bento", base_url="http://127.0.0.1")
        shown.append(_backend(local, models.adapter("tier").health(), tier="local"))
    return shapes.Backends(worker=os.getpid(), data=shown)


async def config(call: Call) -> shapes.Config:
    """The configuration in use and its version; how the gateway holds a request, and the models' names."""
    watcher = call.state.configuration
    current: Configuration = watcher.current
    return shapes.Config(
        version=current.version,
        loaded_at=current.loaded_at,
        fault=None if watcher.fault is None else without_values(watcher.fault),
        tutelage=__version__,
        gateway=current.gateway.model_dump(),
        routing=current.routing.model_dump(),
        models=[entry.name for entry in current.models.models],
    )


def without_values(fault: str) -> str:
    """The first fault of a file, without what stands there: a misplaced value may be a credential."""
    told = fault.split("\n")[0].partition(" (got ")[0]
    return told if told == fault else f"{told} (the gateway's log has the rest)"


def _backend(entry: ModelEntry, replicas: list[ReplicaHealth], *, tier: str | None = None) -> shapes.Backend:
    return shapes.Backend(
        name=entry.name,
        tier=tier or entry.tier,  # type: ignore[arg-type]
        kind=entry.kind,
        available=callable_now(replicas),
        domains=list(entry.domains),
        fallbacks=list(entry.fallbacks),
        replicas=[shapes.Replica(**asdict(replica)) for replica in replicas],
    )


ROUTES = (
    Route("GET", "/backends", "backends.read", backends, shapes.Backends),
    Route("GET", "/config", "config.read", config, shapes.Config),
)
