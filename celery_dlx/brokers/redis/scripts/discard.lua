-- Letters are deleted. KEYS: letters, payloads, records, stats   ARGV: ids (at most a few hundred)
-- Returns the ids that were there.
-- include causes
local removed = {}
for _, id in ipairs(ARGV) do
  if redis.call('ZREM', KEYS[1], id) == 1 then
    drop(id, redis.call('HGET', KEYS[3], id) or '')
    removed[#removed + 1] = id
  end
end
if #removed > 0 then redis.call('HINCRBY', KEYS[4], 'discarded', #removed) end
return removed
