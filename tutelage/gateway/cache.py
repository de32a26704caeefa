"""The exact answer cache of each tenant, in Valkey. A slow or dead Valkey is a miss, never an error.

The tenant is part of the key's type, so no code path can look up another tenant's answer. It refuses to know what is worth caching.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
from dataclasses import dataclass
from typing import Any

import valkey.asyncio
from valkey.exceptions import ValkeyError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheKey:
    """Whose answer to what, under which routing: the digest is keyed by a secret, so a key tells nothing of the prompt."""

    tenant_id: str
    digest: str

    def __str__(self) -> str:
        return f"tutelage:exact:{self.tenant_id}:{self.digest}"


def cache_key(tenant_id: str, shape: dict[str, Any], *, secret: str, generation: str) -> CacheKey:
    """`shape` is everything in the request that shapes the answer; `generation` changes with the models that may answer it."""
    material = json.dumps([tenant_id, generation, shape], sort_keys=True, ensure_ascii=False).encode()
    return CacheKey(tenant_id, hmac.new(secret.encode(), material, hashlib.sha256).hexdigest())


class ExactCache:
    """Answers by key, for `ttl_seconds`; every call ends within `deadline_seconds`."""

    def __init__(self, url: str, *, ttl_seconds: int, deadline_seconds: float) -> None:
        self._client = valkey.asyncio.from_url(url, socket_connect_timeout=deadline_seconds)
        self._ttl = ttl_seconds
        self._deadline = deadline_seconds

    async def get(self, key: CacheKey) -> dict[str, Any] | None:
        try:
            found = await asyncio.wait_for(self._client.get(str(key)), self._deadline)
            return json.loads(found) if found else None
        except (TimeoutError, ValkeyError, OSError, ValueError) as failed:
            log.warning("cache lookup failed, treated as a miss: %r", failed)
            return None

    async def put(self, key: CacheKey, value: dict[str, Any]) -> None:
        if self._ttl <= 0:
            return
        try:
            await asyncio.wait_for(self._client.set(str(key), json.dumps(value), ex=self._ttl), self._deadline)
        except (TimeoutError, ValkeyError, OSError) as failed:
            log.warning("cache write failed, skipped: %r", failed)

    async def close(self) -> None:
        await self._client.aclose()
