"""The audit chain, bodies apart from the ledger, and one statement that records a batch of both.

Revision ID: 0005
"""

from alembic import op

revision = "0005"
down_revision = "0004"

TABLES = """
alter table tenants add column bodies text not null default 'full' check (bodies in ('off', 'redacted', 'full'));
alter table tenants add column retention_days integer check (retention_days > 0);
alter table tenants add column cache_seconds integer check (cache_seconds >= 0);
alter table tenants add column erasures integer not null default 0;
create table bodies (
    request_id text primary key references interactions (request_id) on delete cascade,
    tenant_id text not null references tenants (id),
    created_at timestamptz not null,
    salt bytea not null,
    messages jsonb not null,
    answer text not null
);
create index bodies_by_age on bodies (tenant_id, created_at);
insert into bodies select request_id, tenant_id, created_at, '', messages, answer from interactions where endpoint = 'chat';
alter table interactions drop column messages, drop column answer;
create table audit (
    tenant_id text not null,
    sequence bigint not null,
    at text not null,
    kind text not null,
    actor text not null,
    action text not null,
    subject text not null,
    detail text not null,
    hash bytea not null,
    primary key (tenant_id, sequence)
);
create index audit_by_subject on audit (tenant_id, subject);
create table audit_heads (
    tenant_id text primary key,
    sequence bigint not null default 0,
    hash bytea not null default ''
)
"""

FUNCTIONS = [
    # One link: the hash covers the one before it and every field. Control characters part the fields; JSON never holds them bare.
    r"""
    create function audit_append(
        tenant text, moment timestamptz, kind text, actor text, action text, subject text, detail text
    ) returns bigint language plpgsql as $$
    declare
        head audit_heads%rowtype;
        stamp text := to_char(moment at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');
    begin
        insert into audit_heads (tenant_id) values (tenant) on conflict do nothing;
        select * into head from audit_heads where tenant_id = tenant for update;
        head.sequence := head.sequence + 1;
        head.hash := sha256(head.hash || convert_to(
            concat_ws(E'\x1f', tenant, head.sequence::text, stamp, kind, actor, action, subject, detail), 'UTF8'));
        insert into audit values (tenant, head.sequence, stamp, kind, actor, action, subject, detail, head.hash);
        update audit_heads set sequence = head.sequence, hash = head.hash where tenant_id = tenant;
        return head.sequence;
    end $$
    """,
    # A batch of interactions with their bodies, attempts and links. Heads are locked in one order, so that workers never deadlock. A row
    # of route 'lost' was written for a worker that only stood still: the real one replaces it; any other double is an error.
    """
    create function record_interactions(batch jsonb) returns void language plpgsql as $$
    declare
        entry jsonb;
        r interactions%rowtype;
        b bodies%rowtype;
    begin
        insert into audit_heads (tenant_id)
            select distinct e ->> 'tenant_id' from jsonb_array_elements(batch) e order by 1 on conflict do nothing;
        perform 1 from audit_heads where tenant_id in (select e ->> 'tenant_id' from jsonb_array_elements(batch) e)
            order by tenant_id for update;
        for entry in select * from jsonb_array_elements(batch) loop
            r := jsonb_populate_record(null::interactions, entry);
            r.prompt_hash := decode(entry ->> 'prompt_hash', 'hex');
            r.embedding := decode(entry ->> 'embedding', 'hex');
            delete from interactions where request_id = r.request_id and route = 'lost';
            insert into interactions select r.*;
            if entry ? 'messages' then
                insert into bodies values (r.request_id, r.tenant_id, r.created_at, decode(entry ->> 'salt', 'hex'),
                    entry -> 'messages', entry ->> 'answer');
            end if;
            insert into attempts (request_id, position, model, tier, digest, answer, score, confidence, accepted, reason, cost_microusd)
                select r.request_id, a.number - 1, t.model, t.tier, t.digest, t.answer, t.score, t.confidence, t.accepted, t.reason,
                    t.cost_microusd
                from jsonb_array_elements(entry -> 'attempts') with ordinality a (value, number),
                    jsonb_populate_record(null::attempts, a.value) t;
            perform audit_append(r.tenant_id, r.created_at, 'request', r.key_id, r.endpoint, r.request_id, entry ->> 'detail');
        end loop;
    end $$
    """,
    """
    create function append_only() returns trigger language plpgsql as $$
    begin
        raise exception '% is append-only', tg_table_name using errcode = 'integrity_constraint_violation';
    end $$
    """,
    # What the loop finds out later (domain, embedding) may be added and what could tell of the prompt erased; the bill may not change.
    """
    create function bill_unchanged() returns trigger language plpgsql as $$
    begin
        if tg_op = 'DELETE' then
            if old.route = 'lost' then return old; end if;
            raise exception 'interactions are a ledger: no row may be deleted' using errcode = 'integrity_constraint_violation';
        end if;
        if to_jsonb(new) - 'domain' - 'embedding' - 'prompt_hash' <> to_jsonb(old) - 'domain' - 'embedding' - 'prompt_hash' then
            raise exception 'interactions are a ledger: what was billed may not change' using errcode = 'integrity_constraint_violation';
        end if;
        return new;
    end $$
    """,
    "create trigger audit_append_only before update or delete or truncate on audit for each statement execute function append_only()",
    "create trigger ledger_unchanged before update or delete on interactions for each row execute function bill_unchanged()",
]


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        op.execute(statement)
    for statement in FUNCTIONS:
        op.execute(statement)
    # what was answered before there was a chain gets its link now, in the order it happened
    op.execute(
        """
        select audit_append(tenant_id, created_at, 'request', key_id, endpoint, request_id, json_build_object(
            'model', model, 'tier', tier, 'route', route, 'cache', cache, 'prompt_tokens', prompt_tokens,
            'completion_tokens', completion_tokens, 'cost_microusd', cost_microusd, 'finish_reason', finish_reason, 'body', null)::text)
        from (select * from interactions order by created_at, request_id) old
        """
    )
