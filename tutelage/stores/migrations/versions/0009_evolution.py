"""Gaps in full, the evidence of each version as it comes in, rollouts on their way, canaries, and adapters in quarantine.

Revision ID: 0009
"""

from alembic import op

revision = "0009"
down_revision = "0008"

TABLES = """
alter table gaps add column detail jsonb not null default '{}';
alter table promotions drop constraint promotions_action_check;
alter table promotions add constraint promotions_action_check
    check (action in ('promote', 'keep', 'refuse', 'rollback', 'challenge', 'advance', 'stop', 'demote', 'quarantine'));
alter table versions drop constraint versions_status_check;
alter table versions add constraint versions_status_check
    check (status in ('training', 'refused', 'challenger', 'student', 'ta', 'teacher', 'quarantined'));
create table tests (
    number integer not null,
    year integer not null,
    student text not null,
    version integer not null,
    question text not null check (question in ('ta', 'teacher', 'champion')),
    passed boolean not null default false,
    primary key (year, number),
    unique (student, version, question),
    foreign key (student, version) references versions (student, version)
);
create table evidence (
    student text not null,
    version integer not null,
    source text not null check (source in ('held-out', 'live', 'pairs', 'stage')),
    wins integer not null default 0,
    ties integer not null default 0,
    losses integer not null default 0,
    primary key (student, version, source),
    foreign key (student, version) references versions (student, version)
);
create table rollouts (
    tenant_id text not null references tenants (id),
    domain text not null,
    student text not null,
    version integer not null,
    percent integer not null check (percent between 0 and 100),
    tier text not null,
    waiting jsonb not null default '{"candidate": [], "champion": []}',
    updated_at timestamptz not null default now(),
    primary key (tenant_id, domain),
    foreign key (student, version) references versions (student, version)
);
create table watches (
    student text not null,
    version integer not null,
    signal text not null check (signal in ('acceptance', 'truncation', 'latency')),
    baseline double precision,
    state jsonb not null default '[]',
    seen integer not null default 0,
    bad integer not null default 0,
    alarm boolean not null default false,
    reason text not null default '',
    primary key (student, version, signal),
    foreign key (student, version) references versions (student, version)
);
create table looked (
    tenant_id text primary key references tenants (id),
    feedback_id bigint not null default 0,
    served_until timestamptz not null default '-infinity'
);
create table canaries (
    tenant_id text not null references tenants (id),
    domain text not null,
    key bytea not null,
    embedding bytea not null,
    quarter integer not null,
    primary key (tenant_id, domain, key)
);
create index attempts_by_digest on attempts (digest, request_id)
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        op.execute(statement)
