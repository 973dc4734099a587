-- Letters are deleted. KEYS: letters, payloads, records, stats   ARGV: ids (at most a few hundred)
-- Returns the ids that were there.
-- include causes
local removed = {}
for _, id in ipairs(ARGV) do
  if redis.call('ZREM', KEYS[1], id) == 1 then removed[#removed + 1] = id end
end
if #removed > 0 then
  drop(removed, redis.call('HMGET', KEYS[3], unpack(removed)))
  redis.call('HINCRBY', KEYS[4], 'discarded', #removed)
end
return removed
