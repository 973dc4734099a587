-- Put a delivery back into its list. KEYS: unacked, unacked_index, deliveries, list
-- ARGV: tag, 'L' or 'R' (the end), the message's own delivery tag, milliseconds to remember its count,
--       seconds since it was last renewed at least, or ''
-- Returns 1, or 0 if it is not unacknowledged any more, or was renewed meanwhile.
if ARGV[5] ~= '' then
  local renewed, now = redis.call('ZSCORE', KEYS[2], ARGV[1]), redis.call('TIME')
  if renewed and now[1] + now[2] / 1000000 - renewed < tonumber(ARGV[5]) then return 0 end
end
local entry = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
if not entry then return 0 end
-- The entry is [<item>, "", "<queue>"]: the item's bytes end at the last such separator, for inside the queue's name
-- quotes are escaped.
local at, from = nil, 1
while true do
  local found = string.find(entry, ', "", "', from, true)
  if not found then break end
  at, from = found, found + 1
end
redis.call(ARGV[2] == 'L' and 'LPUSH' or 'RPUSH', KEYS[4], string.sub(entry, 2, at - 1))
redis.call('HDEL', KEYS[1], ARGV[1])
if ARGV[3] ~= '' then
  redis.call('HINCRBY', KEYS[3], ARGV[3], 1)
  redis.call('PEXPIRE', KEYS[3], ARGV[4])
end
return 1
