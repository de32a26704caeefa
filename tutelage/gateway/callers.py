"""Who asks: the tenant and key behind an `Authorization` header, with the limits of both, from the snapshot alone.

It never asks the database, so a store that is down makes no key unknown. It refuses to know what is asked.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from tutelage.errors import Forbidden, Suspended, Unauthenticated
from tutelage.gateway import keys
from tutelage.gateway.admission import Party
from tutelage.gateway.limits import DEFAULT, Limits, agreed, check_strategy, strategies
from tutelage.gateway.snapshot import Snapshot, Watcher
from tutelage.records import Bodies, Key, Strategy, Tenant
from tutelage.routing.strategies import BASIC

MOST_KNOWN = 10_000


@dataclass(frozen=True)
class Caller:
    """A tenant by one of its keys. `models`: those the key may name (None: any); `routes`: those it may use (None: any)."""

    tenant: Party
    key: Party
    models: frozenset[str] | None = None
    on_disconnect: Literal["cancel", "drain"] = "cancel"
    bodies: Bodies = "full"
    cache_seconds: int | None = None  # how long its answers are kept; None: as long as the gateway says
    semantic_error_budget: float | None = None  # None: as much as the gateway says
    strategy: Strategy = "quality"
    strategies: frozenset[Strategy] = BASIC  # those its plan allows
    max_cost_microusd: int | None = None
    min_confidence: float | None = None  # the least quality that it is promised; None: nothing was stated
    erasures: int = 0
    routes: frozenset[str] | None = None

    @property
    def tenant_id(self) -> str:
        return self.tenant.id

    @property
    def key_id(self) -> str:
        return self.key.id

    def check_route(self, route: str) -> None:
        """Raises Forbidden when the key may not use this endpoint."""
        if self.routes is not None and route not in self.routes:
            allowed = ", ".join(sorted(self.routes)) or "none"
            raise Forbidden(f"this key may not use {route}; it may use: {allowed}")

    def check_model(self, name: str) -> None:
        """Raises Forbidden when the key may not name this model."""
        if self.models is not None and name not in self.models:
            allowed = ", ".join(sorted(self.models)) or "none"
            raise Forbidden(f"this key may not use model {name!r}; it may use: {allowed}", param="model")

    def check_strategy(self, strategy: Strategy) -> None:
        """Raises Forbidden when the tenant's plan does not allow the strategy."""
        check_strategy(strategy, self.strategies, param="x-tutelage-strategy")


class Callers:
    """Authenticates by the newest snapshot; what a key amounts to is worked out once a snapshot."""

    def __init__(self, watcher: Watcher, *, pepper: str, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._watcher = watcher
        self._pepper = pepper
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._known: dict[bytes, tuple[datetime | None, Caller]] = {}  # until when, and who
        self._key = secrets.token_bytes(16)

    def authenticate(self, authorization: str | None) -> Caller:
        """
        Raises:
            Unauthenticated: no key, or none that opens anything now.
            Suspended: its tenant may not ask at present.
            Unavailable: no keys have been read yet.
        """
        snapshot, now = self._watcher.current, self._clock()
        if snapshot is not self._snapshot or len(self._known) > MOST_KNOWN:
            self._snapshot, self._known = snapshot, {}
        # what was presented is remembered as a digest only
        digest = hashlib.blake2b((authorization or "").encode(), digest_size=16, key=self._key).digest()
        known = self._known.get(digest)
        if known is not None and (known[0] is None or known[0] > now):
            return known[1]
        presented = keys.parse(authorization)
        key = keys.check(presented, snapshot.keys.get(presented.id), pepper=self._pepper, now=now)
        caller = _caller(key, snapshot)
        ends = [at for at in (key.expires_at, key.revoked_at) if at is not None]
        self._known[digest] = min(ends, default=None), caller
        return caller

    def administrator(self, authorization: str | None) -> Key:
        """The key itself, of an operator or of a tenant that is active; what it may do is for `roles.py`. Raises as `authenticate`."""
        snapshot = self._watcher.current
        presented = keys.parse(authorization)
        key = keys.check(presented, snapshot.keys.get(presented.id), pepper=self._pepper, now=self._clock())
        if key.tenant_id is not None:
            _active(key.tenant_id, snapshot)
        return key


def _active(tenant_id: str, snapshot: Snapshot) -> Tenant:
    tenant = snapshot.tenants.get(tenant_id)
    if tenant is None:  # deleted between the reading of keys and of tenants
        raise Unauthenticated("the tenant of this key was deleted")
    if tenant.status != "active":
        raise Suspended("this tenant is suspended; its data is kept: ask your administrator to resume it")
    return tenant


def _caller(key: Key, snapshot: Snapshot) -> Caller:
    if key.tenant_id is None:
        raise Unauthenticated("this is an operator key; requests need a tenant's key: tutelage keys create TENANT")
    tenant = _active(key.tenant_id, snapshot)
    able = strategies(tenant.tier)
    return Caller(
        Party("tenant", tenant.id, tenant.id, agreed(tenant.tier, tenant.limits)),
        Party("key", tenant.id, key.id, Limits.model_validate(dict(key.limits))),
        frozenset(key.models) if key.models is not None else None,
        tenant.on_disconnect,
        "off" if snapshot.full(tenant) else tenant.bodies,
        tenant.cache_seconds,
        tenant.semantic_error_budget,
        tenant.strategy if tenant.strategy in able else DEFAULT,  # it may have been moved to a plan that does not allow it
        able,
        tenant.max_cost_microusd,
        tenant.min_confidence,
        tenant.erasures,
        frozenset(key.routes) if key.routes is not None else None,
    )
