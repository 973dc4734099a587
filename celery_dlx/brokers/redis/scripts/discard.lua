-- Letters are deleted. KEYS: letters, payloads, records, stats   ARGV: ids (at most a few hundred)
-- Returns the ids that were there.
local removed = {}
for _, id in ipairs(ARGV) do
  if redis.call('ZREM', KEYS[1], id) == 1 then
    local bytes = redis.call('HSTRLEN', KEYS[2], id)
    redis.call('HDEL', KEYS[2], id)
    redis.call('HDEL', KEYS[3], id)
    redis.call('HINCRBY', KEYS[4], 'bytes', 0 - bytes)
    removed[#removed + 1] = id
  end
end
if #removed > 0 then redis.call('HINCRBY', KEYS[4], 'discarded', #removed) end
return removed
