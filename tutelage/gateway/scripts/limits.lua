-- Grant and end requests, many in one call, each from all of its limits or from none. One reply each: {limit, party, milliseconds}.
-- KEYS of each request: what its worker runs (hash by request id); then five a party: slots (sorted set by end), day (count),
-- rate and tokens (buckets), month (micro-dollars).
-- ARGV: how many requests; then of each its verb, the number of its parties, the request id, and
--   admit: slot milliseconds, reserved tokens, reserved micro-dollars, the reservation as JSON for whoever finds it when this
--          worker has died. Replies with the limit that forbids it, "none", or "unknown" for a counter that is gone; the party
--          (from 0) it is of; how long to wait. It looks at everything before it takes anything: a refused request uses up nothing.
--   end:   queries (1 when it was not answered), tokens, micro-dollars to give back (negative: it took more), "". Works once.
-- then five bounds a party, -1 for none.
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

local function admit(key, arg, parties, id)
  local slot_ms, tokens, cost = tonumber(ARGV[arg]), tonumber(ARGV[arg + 1]), tonumber(ARGV[arg + 2])
  local levels = {}
  for p = 0, parties - 1 do
    local k, a = key + p * 5, arg + 3 + p * 5
    local slots, queries, rate, flow, spend =
      tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3]), tonumber(ARGV[a + 4]), tonumber(ARGV[a + 5])
    if slots >= 0 and redis.call('ZCARD', KEYS[k + 1]) >= slots then
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
  for p = 0, parties - 1 do
    local k, a = key + p * 5, arg + 3 + p * 5
    if tonumber(ARGV[a + 1]) >= 0 then
      redis.call('ZADD', KEYS[k + 1], now + slot_ms, id)
      redis.call('PEXPIRE', KEYS[k + 1], slot_ms)
    end
    if tonumber(ARGV[a + 2]) >= 0 then redis.call('INCR', KEYS[k + 2]) end
    if levels[p][1] then drain(KEYS[k + 3], levels[p][1] - 1) end
    if levels[p][2] then drain(KEYS[k + 4], levels[p][2] - tokens) end
    if tonumber(ARGV[a + 5]) >= 0 then redis.call('INCRBY', KEYS[k + 5], cost) end
  end
  redis.call('HSET', KEYS[key], id, ARGV[arg + 3])
  return {'none', 0, 0}
end

local function finish(key, arg, parties, id)
  local queries, tokens, cost = tonumber(ARGV[arg]), tonumber(ARGV[arg + 1]), tonumber(ARGV[arg + 2])
  if redis.call('HDEL', KEYS[key], id) == 0 then return {'gone', 0, 0} end
  for p = 0, parties - 1 do
    local k, a = key + p * 5, arg + 3 + p * 5
    if tonumber(ARGV[a + 1]) >= 0 then redis.call('ZREM', KEYS[k + 1], id) end
    if queries > 0 and tonumber(ARGV[a + 2]) >= 0 and redis.call('EXISTS', KEYS[k + 2]) == 1 then
      redis.call('DECRBY', KEYS[k + 2], queries)
    end
    if tonumber(ARGV[a + 4]) >= 0 and redis.call('EXISTS', KEYS[k + 4]) == 1 then
      redis.call('HINCRBYFLOAT', KEYS[k + 4], 'level', tokens)
    end
    if tonumber(ARGV[a + 5]) >= 0 and redis.call('EXISTS', KEYS[k + 5]) == 1 then redis.call('DECRBY', KEYS[k + 5], cost) end
  end
  return {'none', 0, 0}
end

local told, key, arg = {}, 1, 2
for n = 1, tonumber(ARGV[1]) do
  local verb, parties, id = ARGV[arg], tonumber(ARGV[arg + 1]), ARGV[arg + 2]
  told[n] = (verb == 'admit' and admit or finish)(key, arg + 3, parties, id)
  key, arg = key + 1 + parties * 5, arg + 7 + parties * 5
end
return told
