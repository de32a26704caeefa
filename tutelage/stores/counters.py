"""The asynchronous client of Valkey, where a worker's counters and kept answers are. It refuses to know what they mean."""

from __future__ import annotations

from typing import Any

import valkey.asyncio
from valkey.connection import LibvalkeyRespSerializer


class Packing:
    """A connection that packs commands in C, as the library's synchronous one does: in Python a call of a script with eighty arguments,
    which a busy worker makes every few milliseconds, costs as much as what it does."""

    _serializer = LibvalkeyRespSerializer()

    def pack_command(self, *arguments: Any) -> list[bytes]:
        return self._serializer.pack(*arguments)  # type: ignore[no-any-return]


def connect(url: str, *, connect_seconds: float) -> valkey.asyncio.Valkey:
    """A client of its own; nothing is opened before the first command."""
    client = valkey.asyncio.from_url(url, socket_connect_timeout=connect_seconds)
    pool = client.connection_pool
    pool.connection_class = type("PackingConnection", (Packing, pool.connection_class), {})
    return client
