-- End one request, once: free its slots and give back what it reserved and did not take. KEYS as in admit.lua.
-- ARGV: request id, queries (1 when it was not answered), tokens and micro-dollars to give back (negative: it took more);
-- then five bounds a party.
local id, queries, tokens, cost = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if redis.call('HDEL', KEYS[1], id) == 0 then return 0 end
for p = 0, (#KEYS - 1) / 5 - 1 do
  local k, a = 1 + p * 5, 4 + p * 5
  redis.call('ZREM', KEYS[k + 1], id)
  if tonumber(ARGV[a + 2]) >= 0 and redis.call('EXISTS', KEYS[k + 2]) == 1 then redis.call('INCRBY', KEYS[k + 2], -queries) end
  if tonumber(ARGV[a + 4]) >= 0 and redis.call('EXISTS', KEYS[k + 4]) == 1 then
    redis.call('HINCRBYFLOAT', KEYS[k + 4], 'level', tokens)
  end
  if tonumber(ARGV[a + 5]) >= 0 and redis.call('EXISTS', KEYS[k + 5]) == 1 then redis.call('INCRBY', KEYS[k + 5], -cost) end
end
return 1
