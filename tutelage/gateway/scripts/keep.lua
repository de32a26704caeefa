-- Keep answers, many in one call, within the bounds of each tenant and of all: a tenant's oldest go first, never another's.
-- KEYS: the entries. ARGV: most bytes of a tenant, most of all; then of each entry the head of its tenant's names, its value and seconds. A
-- tenant has an order (sorted set by time kept), sizes (hash) and bytes. How many were kept.
local most, most_all = tonumber(ARGV[1]), tonumber(ARGV[2])
local clock = redis.call('TIME')
local time = clock[1] * 1000000 + clock[2]
local ALL = 'tutelage:cached:bytes'
local held_of_all = tonumber(redis.call('GET', ALL) or 0)
local added_to_all = 0
local tenants = {}  -- by head: bytes held, bytes added, and what is to be written of its order and its sizes

local function tenant(head)
  local found = tenants[head]
  if not found then
    found = {order = head .. ':order', sizes = head .. ':sizes', bytes = head .. ':bytes', added = 0, times = {}, measures = {}, waiting = {}}
    found.held = tonumber(redis.call('GET', found.bytes) or 0)
    tenants[head] = found
  end
  return found
end

local function write(of)
  if #of.times == 0 then return end
  redis.call('ZADD', of.order, unpack(of.times))
  redis.call('HSET', of.sizes, unpack(of.measures))
  of.times, of.measures, of.waiting = {}, {}, {}
end

local function weigh(of, bytes)
  of.added = of.added + bytes
  added_to_all = added_to_all + bytes
end

-- an entry that is no longer in its tenant's order
local function forget(of, entry)
  weigh(of, -tonumber(redis.call('HGET', of.sizes, entry) or 0))
  redis.call('HDEL', of.sizes, entry)
  redis.call('DEL', entry)
end

local function keep(of, entry, value, seconds, at)
  local size = #value + 300  -- what Valkey itself needs for an entry, about
  if of.waiting[entry] then write(of) end
  if redis.call('ZREM', of.order, entry) == 1 then forget(of, entry) end
  if size > most then return 0 end
  while of.held + of.added + size > most or held_of_all + added_to_all + size > most_all do
    write(of)
    local oldest = redis.call('ZPOPMIN', of.order)
    if #oldest == 0 then return 0 end
    forget(of, oldest[1])
  end
  redis.call('SET', entry, value, 'EX', seconds)
  local n = #of.times
  of.times[n + 1], of.times[n + 2] = at, entry
  of.measures[n + 1], of.measures[n + 2] = entry, size
  of.waiting[entry] = true
  weigh(of, size)
  return 1
end

local kept = 0
for i, entry in ipairs(KEYS) do
  local a = i * 3
  kept = kept + keep(tenant(ARGV[a]), entry, ARGV[a + 1], tonumber(ARGV[a + 2]), time + i)
end
for _, of in pairs(tenants) do
  write(of)
  redis.call('INCRBY', of.bytes, of.added)
end
redis.call('INCRBY', ALL, added_to_all)
return kept
