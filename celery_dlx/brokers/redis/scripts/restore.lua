-- Put deliveries back into their lists, in the order given. KEYS: unacked, unacked_index, then three each: deliveries, list, marks
-- ARGV: 'L' or 'R' (the end), milliseconds to remember counts, seconds since they were last renewed at least or '',
--       then per delivery: tag, which three (from 1), the message's own delivery tag or '' (its return is not counted)
-- Returns how many there were. One that is not unacknowledged any more, or was renewed meanwhile, is not touched.
-- include item
redis.call('ZREM', KEYS[2], '')  -- as in capture.lua: a full server must not refuse what was accepted
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
local push, older, restored = ARGV[1] == 'L' and 'LPUSH' or 'RPUSH', tonumber(ARGV[3]), 0
for at = 4, #ARGV, 3 do
  local tag, key, own_tag = ARGV[at], tonumber(ARGV[at + 1]) * 3, ARGV[at + 2]
  local renewed = older and redis.call('ZSCORE', KEYS[2], tag)
  if not renewed or now - renewed >= older then
    local entry = redis.call('HGET', KEYS[1], tag)
    -- Where the list's key is something else, the delivery stays, and is tried again when it is overdue the next time.
    local item = entry and item_of(entry)
    local pushed = item and redis.pcall(push, KEYS[key + 1], item)
    if type(pushed) == 'table' then
      redis.call('ZADD', KEYS[2], string.format('%.6f', now), tag)
    else
      redis.call('ZREM', KEYS[2], tag)
    end
    if type(pushed) == 'number' then
      redis.call('HDEL', KEYS[1], tag)
      if own_tag ~= '' then
        redis.call('HINCRBY', KEYS[key], own_tag, 1)
        redis.call('PEXPIRE', KEYS[key], ARGV[2])
      end
      restored = restored + 1
      if push == 'LPUSH' then
        -- What is right of it now need not have come before it: it marks no age any more (expire.lua).
        for _, mark in ipairs(redis.call('LRANGE', KEYS[key + 2], 0, -1)) do
          if string.sub(mark, string.find(mark, ' ', 1, true) + 1) == item then redis.call('LREM', KEYS[key + 2], 0, mark) end
        end
      end
    end
  end
end
return restored
