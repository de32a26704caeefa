-- Keep answers, many in one call, within the bounds of each tenant and of all: a tenant's oldest go first, never another's.
-- KEYS of each: the entry; its tenant's order (sorted set by time kept), sizes (hash), bytes; the bytes of all.
-- ARGV: most bytes of a tenant, most of all; then of each its value and seconds. How many were kept.
local most, most_all = tonumber(ARGV[1]), tonumber(ARGV[2])
local clock = redis.call('TIME')

local function keep(entry, order, sizes, mine, all, value, seconds)
  local function drop(name)
    local held = tonumber(redis.call('HGET', sizes, name) or 0)
    redis.call('DEL', name)
    redis.call('HDEL', sizes, name)
    redis.call('ZREM', order, name)
    redis.call('DECRBY', mine, held)
    redis.call('DECRBY', all, held)
  end

  local size = #value + 300  -- what Valkey itself needs for an entry, about
  if redis.call('HEXISTS', sizes, entry) == 1 then drop(entry) end
  if size > most then return 0 end
  while tonumber(redis.call('GET', mine) or 0) + size > most or tonumber(redis.call('GET', all) or 0) + size > most_all do
    local oldest = redis.call('ZRANGE', order, 0, 0)
    if #oldest == 0 then return 0 end
    drop(oldest[1])
  end
  redis.call('SET', entry, value, 'EX', seconds)
  redis.call('ZADD', order, clock[1] * 1000000 + clock[2], entry)
  redis.call('HSET', sizes, entry, size)
  redis.call('INCRBY', mine, size)
  redis.call('INCRBY', all, size)
  return 1
end

local kept = 0
for i = 0, #KEYS / 5 - 1 do
  local k, a = 1 + i * 5, 3 + i * 2
  kept = kept + keep(KEYS[k], KEYS[k + 1], KEYS[k + 2], KEYS[k + 3], KEYS[k + 4], ARGV[a], tonumber(ARGV[a + 1]))
end
return kept
