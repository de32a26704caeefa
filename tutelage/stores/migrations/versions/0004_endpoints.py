"""Interactions of other endpoints than chat.

Revision ID: 0004
"""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("alter table interactions add column endpoint text not null default 'chat' check (endpoint in ('chat', 'embeddings'))")
