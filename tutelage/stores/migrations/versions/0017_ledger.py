"""A batch of interactions in half of the database's time.

Revision ID: 0017
"""

from alembic import op

revision = "0017"
down_revision = "0016"

# Three foreign keys were a quarter of what a row cost. Rows of both tables come from `record_interactions` alone: it looks once a batch
# whether a tenant exists, and writes an interaction together with its body. No tenant and no interaction is ever deleted, but for those of
# route 'lost', which have no body.
CONSTRAINTS = """
alter table interactions drop constraint interactions_tenant_id_fkey;
alter table bodies drop constraint bodies_tenant_id_fkey;
alter table bodies drop constraint bodies_request_id_fkey;
create index interactions_lost on interactions (request_id) where route = 'lost'
"""

# What it does is as before. `prompt_hash` and `embedding` come as PostgreSQL's own hex text (\x…). The links of a batch are computed in
# one pass and written in one statement; heads are locked in the order of tenants, so that workers never deadlock.
RECORD = r"""
    create or replace function record_interactions(batch jsonb) returns void language plpgsql as $$
    declare
        link audit%rowtype;
        links audit[];
        head audit_heads%rowtype;
    begin
        delete from interactions where route = 'lost'
            and request_id in (select e ->> 'request_id' from jsonb_array_elements(batch) e);
        insert into interactions select * from jsonb_populate_recordset(null::interactions, batch);
        insert into attempts (request_id, position, model, tier, digest, answer, score, confidence, accepted, reason, cost_microusd)
            select e ->> 'request_id', a.number - 1, t.model, t.tier, t.digest, t.answer, t.score, t.confidence, t.accepted, t.reason,
                t.cost_microusd
            from jsonb_array_elements(batch) e, jsonb_array_elements(e -> 'attempts') with ordinality a (value, number),
                jsonb_populate_record(null::attempts, a.value) t;
        insert into bodies (request_id, tenant_id, created_at, salt, messages, answer)
            select e ->> 'request_id', e ->> 'tenant_id', (e ->> 'created_at')::timestamptz, decode(e ->> 'salt', 'hex'),
                e -> 'messages', e ->> 'answer'
            from jsonb_array_elements(batch) e where e ? 'messages';
        for link in
            select e ->> 'tenant_id', 0, to_char((e ->> 'created_at')::timestamptz at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
                'request', e ->> 'key_id', e ->> 'endpoint', e ->> 'request_id', e ->> 'detail', ''::bytea
            from jsonb_array_elements(batch) with ordinality as listed (e, number) order by 1, number
        loop
            if head.tenant_id is distinct from link.tenant_id then
                update audit_heads set sequence = head.sequence, hash = head.hash where tenant_id = head.tenant_id;
                head := audit_head(link.tenant_id);
            end if;
            head.sequence := head.sequence + 1;
            link.sequence := head.sequence;
            head.hash := sha256(head.hash || convert_to(concat_ws(E'\x1f', link.tenant_id, link.sequence::text, link.at, link.kind,
                link.actor, link.action, link.subject, link.detail), 'UTF8'));
            link.hash := head.hash;
            links := links || link;
        end loop;
        update audit_heads set sequence = head.sequence, hash = head.hash where tenant_id = head.tenant_id;
        insert into audit select * from unnest(links);
    end $$
"""

HEAD = """
    create function audit_head(tenant text) returns audit_heads language plpgsql as $$
    declare
        head audit_heads%rowtype;
    begin
        select h.* into head from audit_heads h join tenants t on t.id = h.tenant_id where t.id = tenant for update of h;
        if not found then
            insert into audit_heads (tenant_id) select id from tenants where id = tenant on conflict do nothing;
            select h.* into head from audit_heads h join tenants t on t.id = h.tenant_id where t.id = tenant for update of h;
        end if;
        if head.tenant_id is null then
            raise exception 'tenant % does not exist', tenant using errcode = 'foreign_key_violation';
        end if;
        return head;
    end $$
"""


def upgrade() -> None:
    for statement in (*CONSTRAINTS.split(";\n"), HEAD, RECORD):
        op.execute(statement)
