-- Grant and end requests, many in one call, each from all of its limits or from none.
-- ARGV[1]: a JSON array with one array a request: its verb; the hash of what its worker runs; the request's id; its counters' names, five a
-- party: slots (sorted set by end), day (count), rate and tokens (buckets), month (micro-dollars); five bounds a party, -1 for none; then
--   admit: slot milliseconds, reserved tokens, reserved micro-dollars, tenant, key, time. All of it is kept for whoever finds it when
--          this worker has died. Replies with the limit that forbids it, "none", or "unknown" for a counter that is gone; the party
--          (from 0) it is of; how long to wait. It looks at everything before it takes anything: a refused request uses up nothing.
--   end:   queries (1 when it was not answered), tokens, micro-dollars to give back (negative: it took more). Works once.
-- One JSON array comes back, of [limit, party, milliseconds] a request. One argument in and out: a client in Python spends more on
-- fifty than Valkey does on all of this.
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

-- the names and bounds of one party's counters
local function party(names, bounds, p)
  local i = p * 5
  return {slots = names[i + 1], day = names[i + 2], rate = names[i + 3], tokens = names[i + 4], month = names[i + 5]},
    {slots = bounds[i + 1], day = bounds[i + 2], rate = bounds[i + 3], tokens = bounds[i + 4], month = bounds[i + 5]}
end

local function admit(call, running, id, names, bounds, slot_ms, tokens, cost)
  local levels, parties = {}, #names / 5
  for p = 0, parties - 1 do
    local name, bound = party(names, bounds, p)
    if bound.slots >= 0 and redis.call('ZCARD', name.slots) >= bound.slots then
      redis.call('ZREMRANGEBYSCORE', name.slots, '-inf', now)
      if redis.call('ZCARD', name.slots) >= bound.slots then return {'concurrent', p, 1000} end
    end
    if bound.day >= 0 then
      local used = redis.call('GET', name.day)
      if not used then return {'unknown', p, 0} end
      if tonumber(used) >= bound.day then return {'queries_per_day', p, 0} end
    end
    if bound.month >= 0 then
      local used = redis.call('GET', name.month)
      if not used then return {'unknown', p, 0} end
      if tonumber(used) + cost > bound.month then return {'spend_per_month_microusd', p, 0} end
    end
    levels[p] = {}
    if bound.rate >= 0 then
      levels[p].rate = level(name.rate, bound.rate)
      if levels[p].rate < 1 then return {'requests_per_minute', p, math.ceil((1 - levels[p].rate) * 60000 / bound.rate)} end
    end
    if bound.tokens >= 0 then
      levels[p].tokens = level(name.tokens, bound.tokens)
      -- a request larger than a whole minute's worth runs when the bucket is full, or it never would
      local needed = math.min(tokens, bound.tokens)
      if levels[p].tokens < needed then
        return {'tokens_per_minute', p, math.ceil((needed - levels[p].tokens) * 60000 / bound.tokens)}
      end
    end
  end
  for p = 0, parties - 1 do
    local name, bound = party(names, bounds, p)
    if bound.slots >= 0 then
      redis.call('ZADD', name.slots, now + slot_ms, id)
      redis.call('PEXPIRE', name.slots, slot_ms)
    end
    if bound.day >= 0 then redis.call('INCR', name.day) end
    if levels[p].rate then drain(name.rate, levels[p].rate - 1) end
    if levels[p].tokens then drain(name.tokens, levels[p].tokens - tokens) end
    if bound.month >= 0 then redis.call('INCRBY', name.month, cost) end
  end
  redis.call('HSET', running, id, cjson.encode(call))
  -- what runs can be found: a worker that dies before its first beat is known too
  if redis.call('HLEN', running) == 1 then redis.call('SADD', 'tutelage:workers', string.match(running, '^tutelage:worker:(.+):running$')) end
  return {'none', 0, 0}
end

local function finish(_, running, id, names, bounds, queries, tokens, cost)
  if redis.call('HDEL', running, id) == 0 then return {'gone', 0, 0} end
  for p = 0, #names / 5 - 1 do
    local name, bound = party(names, bounds, p)
    if bound.slots >= 0 then redis.call('ZREM', name.slots, id) end
    if queries > 0 and bound.day >= 0 and redis.call('EXISTS', name.day) == 1 then redis.call('DECRBY', name.day, queries) end
    if bound.tokens >= 0 and redis.call('EXISTS', name.tokens) == 1 then redis.call('HINCRBYFLOAT', name.tokens, 'level', tokens) end
    if bound.month >= 0 and redis.call('EXISTS', name.month) == 1 then redis.call('DECRBY', name.month, cost) end
  end
  return {'none', 0, 0}
end

local told = {}
for n, call in ipairs(cjson.decode(ARGV[1])) do
  local verb, running, id, names, bounds = call[1], call[2], call[3], call[4], call[5]
  told[n] = (verb == 'admit' and admit or finish)(call, running, id, names, bounds, call[6], call[7], call[8])
end
return cjson.encode(told)
