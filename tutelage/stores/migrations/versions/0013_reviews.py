"""Who decided, which version waits for a person, what MLflow was shown, and what comparisons with the teacher say of each version.

Revision ID: 0013
"""

from alembic import op

revision = "0013"
down_revision = "0012"

# `evidence.since` and `looked.outcome_id` are ids of outcomes: up to the first none is in the count, up to the second all were looked at.
STATEMENTS = """
alter table promotions add column actor text not null default 'engine';
alter table promotions drop constraint promotions_action_check;
alter table promotions add constraint promotions_action_check check (action in
    ('promote', 'keep', 'refuse', 'rollback', 'challenge', 'advance', 'stop', 'demote', 'quarantine', 'wait'));
alter table versions add column awaits text check (awaits in ('student', 'ta', 'teacher'));
alter table versions drop constraint versions_status_check;
alter table versions add constraint versions_status_check
    check (status in ('training', 'refused', 'waiting', 'challenger', 'student', 'ta', 'teacher', 'quarantined'));
create table projections (
    student text primary key references students (name),
    sequence integer not null default 0,
    shown jsonb,
    meant jsonb not null default '{}'
);
alter table watches drop constraint watches_signal_check;
alter table watches add constraint watches_signal_check
    check (signal in ('acceptance', 'agreement', 'error', 'truncation', 'latency'));
alter table evidence drop constraint evidence_source_check;
alter table evidence add constraint evidence_source_check
    check (source in ('held-out', 'live', 'shadow', 'pairs', 'shadow-pairs', 'stage'));
alter table evidence add column since bigint not null default 0;
alter table looked add column outcome_id bigint not null default 0
"""


def upgrade() -> None:
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
