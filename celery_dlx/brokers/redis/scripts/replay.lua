-- Letters go back to their queues. KEYS: letters, payloads, records, stats, then the lists
-- ARGV: per letter its score as read, index of its list (from 1), bytes of its id and of the message to push, all after
--       blanks; then all these ids and messages, one after the other
-- A letter that someone else replayed, discarded or captured anew since it was read is left alone.
-- Returns the ids that did not move. Removing comes first: after it a full server refuses nothing.
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
local at = 1
for read, list, id_bytes, bytes in string.gmatch(ARGV[1], '(%S+) (%d+) (%d+) (%d+)') do
  local id = string.sub(ARGV[2], at, at + id_bytes - 1)
  if not chosen[id] then
    local score = redis.call('ZSCORE', KEYS[1], id)
    if score and tonumber(score) == tonumber(read) then
      chosen[id] = true
      moved[#moved + 1] = id
      local pushed = items[4 + list]
      pushed[#pushed + 1] = string.sub(ARGV[2], at + id_bytes, at + id_bytes + bytes - 1)
    else
      stayed[#stayed + 1] = id
    end
  end
  at = at + id_bytes + bytes
end
if #moved > 0 then
  redis.call('ZREM', KEYS[1], unpack(moved))
  -- Then at once into the lists: what fails after that (somebody wrote into our keys) costs a letter's rest, no message.
  for list = 5, #KEYS do
    if #items[list] > 0 then redis.call('LPUSH', KEYS[list], unpack(items[list])) end
  end
  drop(moved, redis.call('HMGET', KEYS[3], unpack(moved)))
  redis.call('HINCRBY', KEYS[4], 'replayed', #moved)
end
return stayed
