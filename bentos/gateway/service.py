"""`bentoml serve bentos.gateway.service:Gateway`: the app that `tutelage serve` runs, under BentoML, for those who serve everything so.

Knows BentoML and where the stores are. It refuses to know what a request is: that is all in `tutelage/gateway`.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import bentoml

from tutelage.gateway import app, wire


class Mounted:
    """An ASGI app that is there once BentoML's worker has started it: BentoML runs no lifespan of what it mounts."""

    def __init__(self) -> None:
        self._gateway: wire.Gateway | None = None
        self._opened = AsyncExitStack()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert self._gateway is not None, "BentoML lets no request in before the service has started"
        await self._gateway(scope, receive, send)

    async def open(self) -> None:
        """Raises KeyError: TUTELAGE_DATABASE_URL or TUTELAGE_VALKEY_URL is not set; TutelageError: what it needs does not work."""
        gateway = app.create()
        await self._opened.enter_async_context(gateway.router.lifespan_context(gateway))
        self._gateway = gateway

    async def close(self) -> None:
        self._gateway = None
        await self._opened.aclose()

    @property
    def ready(self) -> bool:
        return self._gateway is not None and bool(self._gateway.state.watcher.ready)


mounted = Mounted()


# What BentoML measures and logs of a request the gateway measures and logs itself; together they cost five sixths of the throughput.
@bentoml.service(
    name="tutelage-gateway",
    workers=1,
    traffic={"timeout": 600},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
    tracing={"excluded_urls": ".*"},
)
@bentoml.asgi_app(mounted, path="/")
class Gateway:
    """The OpenAI-compatible gateway."""

    @bentoml.on_startup
    async def start(self) -> None:
        await mounted.open()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        await mounted.close()

    def __is_ready__(self) -> bool:
        return mounted.ready
