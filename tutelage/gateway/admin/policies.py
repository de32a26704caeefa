"""/admin/v1/tenants/{tenant}/policies: the versions of its routing policy, and going back to one.

It refuses to know what the numbers mean.
"""

from __future__ import annotations

from tutelage.gateway import tenancy
from tutelage.gateway.admin import shapes
from tutelage.gateway.admin.door import Call, Route
from tutelage.stores import policies


async def listing(call: Call) -> shapes.Policies:
    """Every version of its routing policy with its reason and evidence, newest first."""
    assert call.tenant is not None
    return shapes.Policies(data=[shapes.Policy(**row) for row in await policies.history(call.pool, call.tenant.id)])


async def revert(call: Call) -> shapes.Policy:
    """Route again as an older version says, as a new version; gateways know within half a second."""
    assert call.tenant is not None
    asked: shapes.Reversion = call.body
    row = await tenancy.revert_policy(call.pool, call.tenant, asked.version, reason=asked.reason, maker=call.maker, expected=asked.expected)
    return shapes.Policy(**row)


ROUTES = (
    Route("GET", "/tenants/{tenant}/policies", "policies.read", listing, shapes.Policies),
    Route("POST", "/tenants/{tenant}/policies/revert", "policies.revert", revert, shapes.Policy, body=shapes.Reversion, faults=(409,)),
)
