"""Tenants and keys, interactions and feedback, domains, gaps, students and the promotion ledger.

Revision ID: 0001
"""

from alembic import op

revision = "0001"
down_revision = None

STATEMENTS = """
create table tenants (
    id text primary key,
    name text not null unique,
    tier text not null check (tier in ('free', 'pro', 'enterprise')),
    status text not null default 'active' check (status in ('active', 'suspended')),
    created_at timestamptz not null default now()
);
create table keys (
    id text primary key,
    tenant_id text references tenants (id),
    role text check (role in ('admin', 'billing', 'viewer')),
    hash bytea not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    check ((tenant_id is null) <> (role is null))
);
create table interactions (
    request_id text primary key,
    tenant_id text not null references tenants (id),
    key_id text not null,
    created_at timestamptz not null,
    messages jsonb not null,
    prompt_hash bytea not null,
    answer text not null,
    model text not null,
    tier text not null,
    route text not null,
    reason text not null,
    cache text not null,
    domain text,
    given_domain text,
    confidence double precision,
    finish_reason text,
    prompt_tokens integer not null,
    completion_tokens integer not null,
    tokens_estimated boolean not null,
    cost_microusd bigint not null,
    latency_ms integer not null,
    embedding bytea
);
create index interactions_by_tenant on interactions (tenant_id, created_at);
create table attempts (
    request_id text not null references interactions (request_id) on delete cascade,
    position smallint not null,
    model text not null,
    tier text not null,
    digest text,
    answer text not null,
    score double precision,
    confidence double precision,
    accepted boolean not null,
    reason text not null,
    cost_microusd bigint not null,
    primary key (request_id, position)
);
create table feedback (
    id bigint generated always as identity primary key,
    request_id text not null references interactions (request_id) on delete cascade,
    tenant_id text not null references tenants (id),
    created_at timestamptz not null default now(),
    score double precision not null check (score between 0 and 1),
    label text,
    comment text
);
create index feedback_by_request on feedback (request_id, id desc);
create table domains (
    tenant_id text not null references tenants (id),
    name text not null,
    record jsonb not null,
    updated_at timestamptz not null default now(),
    primary key (tenant_id, name)
);
create table cycles (
    id text primary key,
    tenant_id text not null references tenants (id),
    started_at timestamptz not null default now(),
    finished_at timestamptz,
    status text not null default 'running' check (status in ('running', 'finished', 'failed')),
    summary jsonb
);
create unique index one_cycle_at_a_time on cycles (tenant_id) where status = 'running';
create table gaps (
    cycle_id text not null references cycles (id) on delete cascade,
    tenant_id text not null,
    domain text not null,
    requests integer not null,
    failure_rate double precision not null,
    cost_microusd bigint not null,
    priority double precision not null,
    decision text not null,
    reason text not null,
    primary key (cycle_id, domain)
);
create table students (
    name text primary key,
    tenant_id text not null references tenants (id),
    domain text not null,
    created_at timestamptz not null default now(),
    unique (tenant_id, domain)
);
create table versions (
    student text not null references students (name),
    version integer not null,
    cycle_id text not null references cycles (id),
    status text not null check (status in ('training', 'refused', 'student', 'ta', 'teacher')),
    path text not null,
    digest text,
    base_fingerprint text,
    calibrator jsonb,
    evidence jsonb,
    reason text,
    mlflow_version text,
    bento text,
    created_at timestamptz not null default now(),
    primary key (student, version)
);
create table promotions (
    tenant_id text not null references tenants (id),
    domain text not null,
    sequence integer not null,
    action text not null check (action in ('promote', 'keep', 'refuse', 'rollback')),
    student text not null,
    version integer not null,
    champion_student text,
    champion_version integer,
    champion_tier text,
    reason text not null,
    evidence jsonb not null,
    created_at timestamptz not null default now(),
    primary key (tenant_id, domain, sequence)
);
create table epochs (topic text primary key, value bigint not null);
insert into epochs values ('gateway', 0);
"""


def upgrade() -> None:
    for statement in STATEMENTS.split(";\n"):
        if statement.strip():
            op.execute(statement)
