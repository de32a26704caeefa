-- Grant one request, or say which limit forbids it: {limit or "none" or "unknown", party (from 0), milliseconds to wait}.
-- KEYS: what this worker runs (hash by request id); then five a party: slots (sorted set by end), day (count), rate and
-- tokens (buckets), month (micro-dollars).
-- ARGV: request id, slot milliseconds, reserved tokens, reserved micro-dollars, the reservation as JSON, for whoever finds it
-- when this worker has died; then five bounds a party, -1 for none.
-- Looks at everything before it takes anything, so a refused request uses up nothing.
local id, slot_ms, tokens, cost = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- a bucket holds a minute's worth and fills evenly
local function level(key, bound)
  local kept = redis.call('HMGET', key, 'level', 'at')
  if not kept[1] then return bound end
  return math.min(bound, tonumber(kept[1]) + (now - tonumber(kept[2])) * bound / 60000)
end

local function drain(key, left)
  redis.call('HSET', key, 'level', tostring(left), 'at', tostring(now))
  redis.call('PEXPIRE', key, 120000)
end

local levels = {}
for p = 0, (#KEYS - 1) / 5 - 1 do
  local k, a = 1 + p * 5, 5 + p * 5
  local slots, queries, rate, flow, spend =
    tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3]), tonumber(ARGV[a + 4]), tonumber(ARGV[a + 5])
  if slots >= 0 then
    redis.call('ZREMRANGEBYSCORE', KEYS[k + 1], '-inf', now)
    if redis.call('ZCARD', KEYS[k + 1]) >= slots then return {'concurrent', p, 1000} end
  end
  if queries >= 0 then
    local used = redis.call('GET', KEYS[k + 2])
    if not used then return {'unknown', p, 0} end
    if tonumber(used) >= queries then return {'queries_per_day', p, 0} end
  end
  if spend >= 0 then
    local used = redis.call('GET', KEYS[k + 5])
    if not used then return {'unknown', p, 0} end
    if tonumber(used) + cost > spend then return {'spend_per_month_microusd', p, 0} end
  end
  levels[p] = {}
  if rate >= 0 then
    levels[p][1] = level(KEYS[k + 3], rate)
    if levels[p][1] < 1 then return {'requests_per_minute', p, math.ceil((1 - levels[p][1]) * 60000 / rate)} end
  end
  if flow >= 0 then
    levels[p][2] = level(KEYS[k + 4], flow)
    -- a request larger than a whole minute's worth runs when the bucket is full, or it never would
    local needed = math.min(tokens, flow)
    if levels[p][2] < needed then return {'tokens_per_minute', p, math.ceil((needed - levels[p][2]) * 60000 / flow)} end
  end
end

for p = 0, (#KEYS - 1) / 5 - 1 do
  local k, a = 1 + p * 5, 5 + p * 5
  if tonumber(ARGV[a + 1]) >= 0 then
    redis.call('ZADD', KEYS[k + 1], now + slot_ms, id)
    redis.call('PEXPIRE', KEYS[k + 1], slot_ms)
  end
  if tonumber(ARGV[a + 2]) >= 0 then redis.call('INCR', KEYS[k + 2]) end
  if levels[p][1] then drain(KEYS[k + 3], levels[p][1] - 1) end
  if levels[p][2] then drain(KEYS[k + 4], levels[p][2] - tokens) end
  if tonumber(ARGV[a + 5]) >= 0 then redis.call('INCRBY', KEYS[k + 5], cost) end
end
redis.call('HSET', KEYS[1], id, ARGV[5])
return {'none', 0, 0}
