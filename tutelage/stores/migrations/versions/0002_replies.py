"""Replies kept by idempotency key.

Revision ID: 0002
"""

from alembic import op

revision = "0002"
down_revision = "0001"

STATEMENTS = """
create table replies (
    tenant_id text not null references tenants (id) on delete cascade,
    key_digest bytea not null,
    fingerprint bytea not null,
    holder text not null,
    held_until timestamptz not null,
    created_at timestamptz not null default now(),
    headers jsonb,
    media_type text,
    body bytea,
    primary key (tenant_id, key_digest)
);
create index replies_by_age on replies (created_at);
"""


def upgrade() -> None:
    for statement in STATEMENTS.split(";\n"):
        if statement.strip():
            op.execute(statement)
