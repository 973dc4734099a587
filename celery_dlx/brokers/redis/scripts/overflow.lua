-- What is more than a queue may hold leaves its lists and becomes unacknowledged deliveries, oldest first, at most so many.
-- KEYS: unacked, unacked_index, then the queue's lists, most urgent first
-- ARGV: messages allowed, messages taken at most, prefix of the tags, number before the first tag's, the queue's name as JSON
-- Returns the items, whose tags are numbered in this order; the least urgent go first.
-- Sent a second time, because its answer was lost, it takes no more, and answers what it did.
-- include item
local taken, number = {}, tonumber(ARGV[4])
while true do
  local entry = redis.call('HGET', KEYS[1], ARGV[3] .. string.format('%d', number + #taken + 1))
  if not entry then break end
  taken[#taken + 1] = item_of(entry)
end
if #taken > 0 then return taken end
redis.call('ZREM', KEYS[2], '')
local over = 0 - tonumber(ARGV[1])
for list = 3, #KEYS do over = over + redis.call('LLEN', KEYS[list]) end
over = math.min(over, tonumber(ARGV[2]))
local now = redis.call('TIME')
now = now[1] .. '.' .. string.format('%06d', now[2])
for list = #KEYS, 3, -1 do
  while over > 0 do
    local item = redis.call('RPOP', KEYS[list])
    if not item then break end
    number, over = number + 1, over - 1
    local tag = ARGV[3] .. string.format('%d', number)
    redis.call('HSET', KEYS[1], tag, '[' .. item .. ', "", ' .. ARGV[5] .. ']')
    redis.call('ZADD', KEYS[2], now, tag)
    taken[#taken + 1] = item
  end
end
return taken
