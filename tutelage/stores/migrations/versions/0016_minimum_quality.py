"""What a tenant states as the least quality of its answers.

Revision ID: 0016
"""

from alembic import op

revision = "0016"
down_revision = "0014"


def upgrade() -> None:
    op.execute("alter table tenants add column min_confidence double precision check (min_confidence > 0 and min_confidence <= 1)")
