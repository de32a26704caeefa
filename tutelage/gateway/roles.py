"""Who may do what under /admin/v1, and which keys a key may make: pure rules. They refuse to know HTTP, the database and the clock.

An operator's key (of no tenant) acts on the whole installation; a tenant's key with a role acts on that tenant alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tutelage.gateway.limits import Limits
from tutelage.records import Key

Role = Literal["admin", "billing", "viewer"]
Action = Literal[
    "tenants.read", "tenants.create", "tenants.plan", "tenants.settings", "tenants.suspend", "tenants.delete",
    "policies.read", "policies.revert",
    "keys.read", "keys.create", "keys.rotate", "keys.revoke", "operators.read", "operators.create",
    "usage.read", "billing.read", "backends.read", "config.read", "audit.read", "bodies.erase",
]  # fmt: skip
ROLES: tuple[Role, ...] = get_args(Role)
ACTIONS: tuple[Action, ...] = get_args(Action)
ALLOWED: Mapping[str, frozenset[Action]] = {
    "admin": frozenset(ACTIONS),
    "billing": frozenset({"tenants.read", "usage.read", "billing.read"}),
    "viewer": frozenset({
        "tenants.read", "policies.read", "keys.read", "operators.read", "usage.read", "backends.read", "config.read", "audit.read",
    }),
}  # fmt: skip
# what a tenant may be given to do for itself; the rest is the business of whoever runs the installation
OWN: frozenset[Action] = frozenset({
    "tenants.read", "tenants.settings", "policies.read", "policies.revert", "keys.read", "keys.create", "keys.rotate", "keys.revoke",
    "usage.read", "billing.read", "audit.read", "bodies.erase",
})  # fmt: skip
ROUTES = ("chat", "embeddings", "feedback", "models")  # what a key's scope may name


@dataclass(frozen=True)
class Verdict:
    """`hidden`: what it is about belongs to another tenant and must look as if it did not exist."""

    allowed: bool
    reason: str
    hidden: bool = False


def may(key: Key, action: Action, *, of: str | None) -> Verdict:
    """Whether the key may do this to what belongs to tenant `of` (None: to the installation)."""
    if key.role is None or key.role not in ALLOWED:
        return Verdict(False, "this key has no role; administration needs an operator's key or a tenant's key with a role")
    if key.tenant_id is not None and action not in OWN:
        return Verdict(False, f"{action} is for operators; this key belongs to tenant {key.tenant_id}")
    if action not in ALLOWED[key.role]:
        able = ", ".join(role for role in ROLES if action in ALLOWED[role])
        return Verdict(False, f"role {key.role} may not do {action}; it needs role {able}")
    if key.tenant_id is not None and of != key.tenant_id:
        return Verdict(False, f"this key acts on its own tenant {key.tenant_id} alone", hidden=True)
    return Verdict(True, f"role {key.role} may do {action}")


def within(made: Key, maker: Key) -> Verdict:
    """Whether `made` opens nothing that `maker` does not: tenant, role, models, routes, end, and each limit. Operators' keys have no
    models, routes or limits of their own, so only their end and their role bind what they make."""
    if maker.tenant_id is not None and made.tenant_id != maker.tenant_id:
        return Verdict(False, "a tenant's key makes keys of its own tenant only", hidden=True)
    if made.role is not None and not _allowed(made.role) <= _allowed(maker.role):
        return Verdict(False, f"role {made.role} may do more than role {maker.role or 'none'} of the key that makes it")
    for name in ("models", "routes"):
        most, asked = getattr(maker, name), getattr(made, name)
        if most is not None and (asked is None or not set(asked) <= set(most)):
            return Verdict(False, f"{name} {_listed(asked)} are more than those of the key that makes it: {_listed(most)}")
    if maker.expires_at is not None and (made.expires_at is None or made.expires_at > maker.expires_at):
        return Verdict(False, f"it may not outlive the key that makes it, which ends at {maker.expires_at.isoformat()}")
    for name in Limits.model_fields:
        bound, given = maker.limits.get(name), made.limits.get(name)
        if bound is not None and (given is None or given > bound):
            return Verdict(False, f"limit {name} {'none' if given is None else given} is more than {bound} of the key that makes it")
    return Verdict(True, "it opens nothing that the key that makes it does not")


def _allowed(role: str | None) -> frozenset[Action]:
    return frozenset() if role is None else ALLOWED.get(role, frozenset())


def _listed(names: object) -> str:
    return "any" if names is None else ", ".join(sorted(names)) or "none"  # type: ignore[call-overload]
