-- Letters are deleted. KEYS: letters, payloads, records, stats   ARGV: ids (at most a few hundred)
-- Returns how many there were.
local removed = 0
for _, id in ipairs(ARGV) do
  if redis.call('ZREM', KEYS[1], id) == 1 then
    redis.call('HINCRBY', KEYS[4], 'bytes', -redis.call('HSTRLEN', KEYS[2], id))
    redis.call('HDEL', KEYS[2], id)
    redis.call('HDEL', KEYS[3], id)
    removed = removed + 1
  end
end
if removed > 0 then redis.call('HINCRBY', KEYS[4], 'discarded', removed) end
return removed
