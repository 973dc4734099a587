-- Letters go back to their queues. KEYS: letters, payloads, records, stats, then the lists
-- ARGV: per letter: id, its score as read, index of its list (from 1), the message to push
-- A letter that someone else replayed, discarded or captured anew since it was read is left alone.
-- Returns the ids that moved. Removing comes first: after it a full server refuses nothing, and this makes room.
-- include causes
local moved = {}
for i = 1, #ARGV, 4 do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if score and tonumber(score) == tonumber(ARGV[i + 1]) then
    redis.call('ZREM', KEYS[1], ARGV[i])
    drop(ARGV[i], redis.call('HGET', KEYS[3], ARGV[i]) or '')
    redis.call('LPUSH', KEYS[4 + tonumber(ARGV[i + 2])], ARGV[i + 3])
    moved[#moved + 1] = ARGV[i]
  end
end
if #moved > 0 then redis.call('HINCRBY', KEYS[4], 'replayed', #moved) end
return moved
