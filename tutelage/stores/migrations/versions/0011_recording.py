"""A batch of interactions in a handful of statements, whatever its size.

Revision ID: 0011
"""

from alembic import op

revision = "0011"
down_revision = "0010"

# What it does is as before. `prompt_hash` and `embedding` come as PostgreSQL's own hex text (\x…). The links of a batch are computed in
# one pass and written in one statement; heads are locked in the order of tenants, so that workers never deadlock.
RECORD = r"""
    create or replace function record_interactions(batch jsonb) returns void language plpgsql as $$
    declare
        link record;
        head audit_heads%rowtype;
        stamp text;
        tenants text[]; sequences bigint[]; stamps text[]; actors text[]; actions text[]; subjects text[]; details text[]; hashes bytea[];
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
        insert into audit_heads (tenant_id)
            select distinct e ->> 'tenant_id' from jsonb_array_elements(batch) e order by 1 on conflict do nothing;
        for link in
            select e ->> 'tenant_id' as tenant, (e ->> 'created_at')::timestamptz as moment, e ->> 'key_id' as actor,
                e ->> 'endpoint' as action, e ->> 'request_id' as subject, e ->> 'detail' as detail
            from jsonb_array_elements(batch) with ordinality as listed (e, number) order by 1, number
        loop
            if head.tenant_id is distinct from link.tenant then
                update audit_heads set sequence = head.sequence, hash = head.hash where tenant_id = head.tenant_id;
                select * into head from audit_heads where tenant_id = link.tenant for update;
            end if;
            stamp := to_char(link.moment at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');
            head.sequence := head.sequence + 1;
            head.hash := sha256(head.hash || convert_to(concat_ws(E'\x1f', link.tenant, head.sequence::text, stamp, 'request',
                link.actor, link.action, link.subject, link.detail), 'UTF8'));
            tenants := tenants || link.tenant; sequences := sequences || head.sequence; stamps := stamps || stamp;
            actors := actors || link.actor; actions := actions || link.action; subjects := subjects || link.subject;
            details := details || link.detail; hashes := hashes || head.hash;
        end loop;
        update audit_heads set sequence = head.sequence, hash = head.hash where tenant_id = head.tenant_id;
        insert into audit select t, s, m, 'request', a, v, o, d, h
            from unnest(tenants, sequences, stamps, actors, actions, subjects, details, hashes) as u (t, s, m, a, v, o, d, h);
    end $$
"""


def upgrade() -> None:
    op.execute(RECORD)
