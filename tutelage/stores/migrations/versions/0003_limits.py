"""What a tenant and a key may use.

Revision ID: 0003
"""

from alembic import op

revision = "0003"
down_revision = "0002"

STATEMENTS = """
alter table tenants add column limits jsonb not null default '{}';
alter table tenants add column on_disconnect text not null default 'cancel' check (on_disconnect in ('cancel', 'drain'));
alter table keys add column models text[];
alter table keys add column limits jsonb not null default '{}';
"""


def upgrade() -> None:
    for statement in STATEMENTS.split(";\n"):
        if statement.strip():
            op.execute(statement)
