"""How many answers to paraphrases may be wrong, and what is known of it: labels without any text.

Revision ID: 0007
"""

from alembic import op

revision = "0007"
down_revision = "0006"

TABLES = """
alter table tenants add column semantic_error_budget double precision check (semantic_error_budget between 0 and 0.5);
create table semantic_labels (
    id bigserial primary key,
    tenant_id text not null references tenants (id),
    at timestamptz not null default now(),
    probability double precision not null,
    "right" boolean not null,
    traits double precision[] not null
);
create index semantic_labels_by_tenant on semantic_labels (tenant_id, id)
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        op.execute(statement)
