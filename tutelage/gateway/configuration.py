"""The configuration a gateway worker runs on, read again when its files change. What cannot be used is refused and the last good one stays.

It refuses to know what the values mean.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tutelage.errors import ConfigInvalid
from tutelage.settings import GatewaySettings, ModelsSettings, RoutingSettings, TierSettings, load
from tutelage.tasks import end

log = logging.getLogger(__name__)

KINDS = (GatewaySettings, RoutingSettings, TierSettings, ModelsSettings)


@dataclass(frozen=True)
class Configuration:
    """All settings a worker reads. `version` is a digest of the files they came from: equal on all workers that agree."""

    version: str
    loaded_at: datetime
    gateway: GatewaySettings
    routing: RoutingSettings
    tier: TierSettings
    models: ModelsSettings


def read(folder: Path, *, now: datetime, over: Mapping[str, Any] = MappingProxyType({})) -> Configuration:
    """`over` stands above what gateway.yaml says. Raises ConfigInvalid, listing the faults of the first file that has any."""
    version = digest(folder)
    return Configuration(
        version,
        now,
        gateway=load(GatewaySettings, folder).model_copy(update=over),
        routing=load(RoutingSettings, folder),
        tier=load(TierSettings, folder),
        models=load(ModelsSettings, folder),
    )


def digest(folder: Path) -> str:
    """Of the bytes of every file that `read` reads; a missing file counts as an empty one."""
    found = hashlib.sha256()
    for kind in KINDS:
        path = folder / f"{kind.__name__.removesuffix('Settings').lower()}.yaml"
        content = path.read_bytes() if path.exists() else b""
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()[:12]


class ConfigurationWatcher:
    """Keeps `current` as the files say. `changed` is told of every new one before it becomes current, and may refuse it (ConfigInvalid)."""

    def __init__(
        self,
        folder: Path,
        *,
        seconds: float,
        changed: Callable[[Configuration], None],
        over: Mapping[str, Any] = MappingProxyType({}),
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._folder = folder
        self._over = over
        self._seconds = seconds
        self._changed = changed
        self._clock = clock
        self._seen = digest(folder)
        self._task: asyncio.Task[None] | None = None
        self.current = read(folder, now=clock(), over=over)
        self.fault: str | None = None  # why the files as they are now are not used

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await end(self._task)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                self.look()
            except Exception as failed:  # a file that cannot be read now may be there at the next look
                log.warning("configuration not looked at: %r", failed)

    def look(self) -> None:
        """Read the files again if they changed since the last look."""
        found = digest(self._folder)
        if found == self._seen:
            return
        try:
            new = read(self._folder, now=self._clock(), over=self._over)
            self._changed(new)
        except ConfigInvalid as invalid:
            self.fault = invalid.message
            log.error("configuration %s is not used, %s stays: %s", found, self.current.version, invalid.message)
        else:
            log.info("configuration %s replaces %s", new.version, self.current.version)
            self.current, self.fault = new, None
        self._seen = found
