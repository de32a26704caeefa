"""Strategies of tenants, what was routed why and with which probability, outcomes of answers, and versioned policies.

Revision ID: 0008
"""

from alembic import op

revision = "0008"
down_revision = "0007"

STATEMENTS = """
alter table tenants add column strategy text not null default 'quality'
    check (strategy in ('always-teacher', 'direct', 'cascade', 'parallel', 'budget', 'quality'));
alter table tenants add column max_cost_microusd bigint check (max_cost_microusd > 0);
alter table interactions add column strategy text;
alter table interactions add column propensity double precision check (propensity > 0 and propensity <= 1);
alter table interactions add column explored boolean not null default false;
alter table interactions add column policy_version integer;
alter table interactions add column similarity double precision;
alter table interactions drop constraint interactions_endpoint_check;
alter table interactions add constraint interactions_endpoint_check check (endpoint in ('chat', 'embeddings', 'shadow'));
create table policies (
    tenant_id text not null references tenants (id),
    version integer not null check (version > 0),
    created_at timestamptz not null default now(),
    actor text not null,
    reason text not null,
    settings jsonb not null,
    evidence jsonb not null,
    reverts_to integer,
    primary key (tenant_id, version)
);
create trigger policies_append_only before update or delete or truncate on policies for each statement execute function append_only();
create table outcomes (
    id bigint generated always as identity primary key,
    created_at timestamptz not null default now(),
    tenant_id text not null references tenants (id),
    request_id text not null references interactions (request_id),
    model text not null,
    digest text,
    domain text,
    score double precision,
    confidence double precision,
    value double precision not null check (value >= 0 and value <= 1),
    served boolean not null,
    source text not null check (source in ('feedback', 'teacher', 'judge', 'verifier')),
    observed double precision not null check (observed > 0 and observed <= 1)
);
create index outcomes_by_model on outcomes (tenant_id, model, digest, id);
create index outcomes_by_request on outcomes (request_id)
"""


def upgrade() -> None:
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
