"""The admin API, /admin/v1: its door (`door.py`), what is sent and answered (`shapes.py`), and one file a noun."""

from __future__ import annotations

from tutelage.gateway import wire
from tutelage.gateway.admin import audit, installation, keys, policies, reports, tenants
from tutelage.gateway.admin.door import add_route


def add_routes(app: wire.Gateway) -> None:
    """Every route under /admin/v1."""
    for noun in (tenants, policies, keys, reports, installation, audit):
        for route in noun.ROUTES:
            add_route(app, route)
