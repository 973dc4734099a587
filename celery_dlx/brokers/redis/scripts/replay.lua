-- Letters go back to their queues. KEYS: letters, payloads, records, stats, then the lists
-- ARGV: per letter: id, its score as read, index of its list (from 1), the message to push
-- A letter that someone else replayed, discarded or captured anew since it was read is left alone.
-- Returns the ids that did not move. Removing comes first: after it a full server refuses nothing, and this makes room.
-- include causes
local moved, stayed, chosen, items = {}, {}, {}, {}
for list = 5, #KEYS do
  -- Pushing must not fail once letters were removed: whatever else has a list's name, nothing leaves then.
  local kind = redis.call('TYPE', KEYS[list]).ok
  if kind ~= 'list' and kind ~= 'none' then
    return redis.error_reply('WRONGTYPE ' .. KEYS[list] .. ' is a ' .. kind .. ' and no list: no letter moved')
  end
  items[list] = {}
end
for i = 1, #ARGV, 4 do
  local id = ARGV[i]
  if not chosen[id] then
    local score = redis.call('ZSCORE', KEYS[1], id)
    if score and tonumber(score) == tonumber(ARGV[i + 1]) then
      chosen[id] = true
      moved[#moved + 1] = id
      local pushed = items[4 + ARGV[i + 2]]
      pushed[#pushed + 1] = ARGV[i + 3]
    else
      stayed[#stayed + 1] = id
    end
  end
end
if #moved > 0 then
  redis.call('ZREM', KEYS[1], unpack(moved))
  drop(moved, redis.call('HMGET', KEYS[3], unpack(moved)))
  for list = 5, #KEYS do
    if #items[list] > 0 then redis.call('LPUSH', KEYS[list], unpack(items[list])) end
  end
  redis.call('HINCRBY', KEYS[4], 'replayed', #moved)
end
return stayed
