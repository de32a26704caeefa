"""Versions that were abandoned or retired, the teachers and the fresh adapter a student begins with.

Revision ID: 0014
"""

from alembic import op

revision = "0014"
down_revision = "0013"

STATEMENTS = """
alter table versions drop constraint versions_status_check;
alter table versions add constraint versions_status_check check (status in
    ('training', 'refused', 'waiting', 'challenger', 'student', 'ta', 'teacher', 'quarantined',
     'abandoned', 'retired'));
alter table versions add column teachers jsonb not null default '[]';
alter table versions add column fresh_digest text;
create index cycles_by_tenant on cycles (tenant_id, started_at)
"""


def upgrade() -> None:
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
