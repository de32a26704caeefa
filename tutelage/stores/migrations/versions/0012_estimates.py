"""What a cycle learned of each tenant's models from the outcomes of their answers: weights, no text.

Revision ID: 0012
"""

from alembic import op

revision = "0012"
down_revision = "0011"

TABLE = """
    create table estimates (
        tenant_id text primary key references tenants (id),
        learned_at timestamptz not null default clock_timestamp(),
        content bytea not null
    )
"""


def upgrade() -> None:
    op.execute(TABLE)
