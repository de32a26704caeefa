"""Tenants that want nothing learned from their traffic.

Revision ID: 0010
"""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.execute("alter table tenants add column training text not null default 'on' check (training in ('on', 'off'))")
