-- Grant and end requests, many in one call, each from all of its limits or from none.
-- ARGV[1]: the hash of what a worker runs. ARGV[2]: JSON of [standings, calls].
--   standing: an array of parties, each [head of its counters' names, day, bounds]; the bounds are of slots (sorted set by end), day (count),
--             rate and tokens (buckets), month (micro-dollars); -1 is none.
--   call:     [verb, its standing (from 1), the request's id, ...]; what follows is
--     admit: slot milliseconds, reserved tokens, reserved micro-dollars, tenant, key, time. Replies with the limit that forbids it, "none",
--            or "unknown" for a counter that is gone; the party (from 0) it is of; how long to wait. It looks at everything before it takes
--            anything: a refused request uses up nothing. Standing and call of one that is granted are kept, a line each, for whoever finds
--            them when this worker has died.
--     end:   queries (1 when it was not answered), tokens, micro-dollars to give back (negative: it took more). Works once.
-- One JSON array comes back, of [limit, party, milliseconds] a call. What ends makes room for what the same call admits. A counter is read
-- once and written once a call, however many requests take from it: most of them are of few tenants.
local running, asked = ARGV[1], cjson.decode(ARGV[2])
local standings, calls = asked[1], asked[2]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local counters = {}  -- by name: what it holds, what is to be added

local function count(name)
  local found = counters[name]
  if not found then
    local held = redis.call('GET', name)
    found = {held = held and tonumber(held), added = 0}
    counters[name] = found
  end
  return found
end

-- a bucket holds a minute's worth and fills evenly
local function bucket(name, bound)
  local found = counters[name]
  if not found then
    local kept = redis.call('HMGET', name, 'level', 'at')
    local filled = kept[1] and tonumber(kept[1]) + (now - tonumber(kept[2])) * bound / 60000
    found = {level = math.min(bound, filled or bound), changed = false}
    counters[name] = found
  end
  return found
end

local function slots(name)
  local found = counters[name]
  if not found then
    found = {held = redis.call('ZCARD', name), members = {}}  -- members: score, id, score, id, ...
    counters[name] = found
  end
  return found
end

for _, standing in ipairs(standings) do
  standing.text = cjson.encode(standing)
  for _, party in ipairs(standing) do
    local head, day = party[1], party[2]
    party.slots, party.day, party.rate, party.tokens = head .. ':slots', head .. ':day:' .. day, head .. ':rate', head .. ':tokens'
    party.month = head .. ':month:' .. string.sub(day, 1, 6)
    party.bound = {slots = party[3][1], day = party[3][2], rate = party[3][3], tokens = party[3][4], month = party[3][5]}
  end
end

-- the limit that forbids it, the party it is of and how long to wait; nothing when it may run
local function forbidden(party, tokens, cost)
  local bound = party.bound
  if bound.slots >= 0 then
    local taken = slots(party.slots)
    if taken.held + #taken.members / 2 >= bound.slots then
      redis.call('ZREMRANGEBYSCORE', party.slots, '-inf', now)
      taken.held = redis.call('ZCARD', party.slots)
      if taken.held + #taken.members / 2 >= bound.slots then return 'concurrent', 1000 end
    end
  end
  if bound.day >= 0 then
    local used = count(party.day)
    if not used.held then return 'unknown', 0 end
    if used.held + used.added >= bound.day then return 'queries_per_day', 0 end
  end
  if bound.month >= 0 then
    local used = count(party.month)
    if not used.held then return 'unknown', 0 end
    if used.held + used.added + cost > bound.month then return 'spend_per_month_microusd', 0 end
  end
  if bound.rate >= 0 then
    local level = bucket(party.rate, bound.rate).level
    if level < 1 then return 'requests_per_minute', math.ceil((1 - level) * 60000 / bound.rate) end
  end
  if bound.tokens >= 0 then
    local level = bucket(party.tokens, bound.tokens).level
    -- a request larger than a whole minute's worth runs when the bucket is full, or it never would
    local needed = math.min(tokens, bound.tokens)
    if level < needed then return 'tokens_per_minute', math.ceil((needed - level) * 60000 / bound.tokens) end
  end
end

local function pour(name, bound, amount)
  local into = bucket(name, bound)
  into.level, into.changed = math.min(bound, into.level + amount), true
end

local function take(party, id, slot_ms, tokens, cost)
  local bound = party.bound
  if bound.slots >= 0 then
    local taken = slots(party.slots)
    taken.members[#taken.members + 1] = now + slot_ms
    taken.members[#taken.members + 1] = id
    taken.milliseconds = slot_ms
  end
  if bound.day >= 0 then count(party.day).added = count(party.day).added + 1 end
  if bound.rate >= 0 then pour(party.rate, bound.rate, -1) end
  if bound.tokens >= 0 then pour(party.tokens, bound.tokens, -tokens) end
  if bound.month >= 0 then count(party.month).added = count(party.month).added + cost end
end

local granted = {}  -- id, what is kept of it, id, what is kept of it, ...

local function admit(call)
  local standing, id, slot_ms, tokens, cost = standings[call[2]], call[3], call[4], call[5], call[6]
  for p, party in ipairs(standing) do
    local limit, wait = forbidden(party, tokens, cost)
    if limit then return {limit, p - 1, wait} end
  end
  for _, party in ipairs(standing) do take(party, id, slot_ms, tokens, cost) end
  granted[#granted + 1] = id
  granted[#granted + 1] = standing.text .. '\n' .. cjson.encode(call)
  return {'none', 0, 0}
end

local ended = {}  -- ids by the name of their slots

local function finish(call)
  local id, queries, tokens, cost = call[3], call[4], call[5], call[6]
  if redis.call('HDEL', running, id) == 0 then return {'gone', 0, 0} end
  for _, party in ipairs(standings[call[2]]) do
    local bound = party.bound
    if bound.slots >= 0 then
      ended[party.slots] = ended[party.slots] or {}
      table.insert(ended[party.slots], id)
    end
    if bound.day >= 0 then count(party.day).added = count(party.day).added - queries end
    if bound.tokens >= 0 then pour(party.tokens, bound.tokens, tokens) end
    if bound.month >= 0 then count(party.month).added = count(party.month).added - cost end
  end
  return {'none', 0, 0}
end

local told = {}
for n, call in ipairs(calls) do
  if call[1] == 'end' then told[n] = finish(call) end
end
for name, ids in pairs(ended) do redis.call('ZREM', name, unpack(ids)) end
for n, call in ipairs(calls) do
  if call[1] == 'admit' then told[n] = admit(call) end
end

for name, counter in pairs(counters) do
  if counter.members and #counter.members > 0 then
    redis.call('ZADD', name, unpack(counter.members))
    redis.call('PEXPIRE', name, counter.milliseconds)
  elseif counter.changed then
    redis.call('HSET', name, 'level', tostring(counter.level), 'at', tostring(now))
    redis.call('PEXPIRE', name, 120000)
  elseif counter.held and (counter.added or 0) ~= 0 then
    redis.call('INCRBY', name, counter.added)
  end
end
if #granted > 0 then
  redis.call('HSET', running, unpack(granted))
  -- what runs can be found: a worker that dies before its first beat is known too
  if redis.call('HLEN', running) == #granted / 2 then
    redis.call('SADD', 'tutelage:workers', string.match(running, '^tutelage:worker:(.+):running$'))
  end
end
return cjson.encode(told)
