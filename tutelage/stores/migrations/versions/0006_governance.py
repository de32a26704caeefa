"""Keys that may use only some routes or administer their tenant, tenants that are gone, and how much each keeps.

Revision ID: 0006
"""

from alembic import op

revision = "0006"
down_revision = "0005"

TABLES = """
alter table tenants drop constraint tenants_status_check;
alter table tenants add constraint tenants_status_check check (status in ('active', 'suspended', 'deleted'));
alter table tenants drop constraint tenants_name_key;
create unique index tenants_by_name on tenants (name) where status <> 'deleted';
alter table keys add column routes text[];
alter table keys drop constraint keys_check;
alter table keys add constraint keys_open_something check (tenant_id is not null or role is not null);
alter table bodies add column bytes integer generated always as (octet_length(messages::text) + octet_length(answer)) stored;
create table storage (
    tenant_id text primary key references tenants (id),
    bytes bigint not null
);
insert into storage select tenant_id, sum(bytes) from bodies group by tenant_id;
create table storage_changes (
    tenant_id text not null,
    bytes bigint not null
)
"""

FUNCTIONS = [
    # Changes are only ever added here and summed up elsewhere: recording and erasing never wait for one another's count.
    """
    create function count_stored() returns trigger language plpgsql as $$
    begin
        if tg_op = 'INSERT' then
            insert into storage_changes select tenant_id, sum(bytes) from changed group by tenant_id;
        else
            insert into storage_changes select tenant_id, -sum(bytes) from changed group by tenant_id;
        end if;
        return null;
    end $$
    """,
    """
    create trigger bodies_added after insert on bodies referencing new table as changed
        for each statement execute function count_stored()
    """,
    """
    create trigger bodies_removed after delete on bodies referencing old table as changed
        for each statement execute function count_stored()
    """,
    # As before, but all bodies of a batch in one statement, so that they are counted once.
    """
    create or replace function record_interactions(batch jsonb) returns void language plpgsql as $$
    declare
        entry jsonb;
        r interactions%rowtype;
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
            insert into attempts (request_id, position, model, tier, digest, answer, score, confidence, accepted, reason, cost_microusd)
                select r.request_id, a.number - 1, t.model, t.tier, t.digest, t.answer, t.score, t.confidence, t.accepted, t.reason,
                    t.cost_microusd
                from jsonb_array_elements(entry -> 'attempts') with ordinality a (value, number),
                    jsonb_populate_record(null::attempts, a.value) t;
            perform audit_append(r.tenant_id, r.created_at, 'request', r.key_id, r.endpoint, r.request_id, entry ->> 'detail');
        end loop;
        insert into bodies (request_id, tenant_id, created_at, salt, messages, answer)
            select e ->> 'request_id', e ->> 'tenant_id', (e ->> 'created_at')::timestamptz, decode(e ->> 'salt', 'hex'),
                e -> 'messages', e ->> 'answer'
            from jsonb_array_elements(batch) e where e ? 'messages';
    end $$
    """,
]


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        op.execute(statement)
    for statement in FUNCTIONS:
        op.execute(statement)
