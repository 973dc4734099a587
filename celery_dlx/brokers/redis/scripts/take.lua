-- Included by the scripts of limits, which take items from lists. KEYS[1], KEYS[2]: unacked, unacked_index.
-- include item
local time = redis.call('TIME')
local taken = {}

local function tag_of(prefix, before) return prefix .. string.format('%d', before + #taken + 1) end

-- Whether this was sent before, and its answer lost: then `taken` is what it took.
local function took_before(prefix, before)
  while true do
    local entry = redis.call('HGET', KEYS[1], tag_of(prefix, before))
    if not entry then break end
    taken[#taken + 1] = item_of(entry)
  end
  return #taken > 0
end

-- The oldest of a list becomes an unacknowledged delivery; whether there was one. `queue`: its name as JSON.
local function take(list, prefix, before, queue)
  local item = redis.call('RPOP', list)
  if not item then return false end
  local tag = tag_of(prefix, before)
  redis.call('HSET', KEYS[1], tag, '[' .. item .. ', "", ' .. queue .. ']')
  redis.call('ZADD', KEYS[2], time[1] .. '.' .. string.format('%06d', time[2]), tag)
  taken[#taken + 1] = item
  return true
end
