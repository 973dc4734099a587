-- A DLQ keeps within its caps, also when nothing dies. KEYS: letters, payloads, records, stats
-- ARGV: max_length, max_age in ms, max_bytes or 0
-- Returns how many letters went now, how many there are, the bytes of their messages, and how many went ever.
-- include causes
-- include retention
local gone, ever = keep_within(tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])), 0
for _, cap in ipairs({'age', 'length', 'bytes'}) do
  ever = ever + tonumber(redis.call('HGET', KEYS[4], 'evicted_max_' .. cap) or '0')
end
return {gone, redis.call('ZCARD', KEYS[1]), tonumber(redis.call('HGET', KEYS[4], 'bytes') or '0'), ever}
