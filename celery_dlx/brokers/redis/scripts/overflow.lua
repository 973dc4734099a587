-- What is more than a queue may hold leaves its lists and becomes unacknowledged deliveries, oldest first, at most so many.
-- KEYS: unacked, unacked_index, then the queue's lists, most urgent first
-- ARGV: messages allowed, messages taken at most, prefix of the tags, number before the first tag's, the queue's name as JSON
-- Returns the items, whose tags are numbered in this order; the least urgent go first.
-- Sent a second time, because its answer was lost, it takes no more, and answers what it did.
-- include take
local prefix, number = ARGV[3], tonumber(ARGV[4])
if took_before(prefix, number) then return taken end
redis.call('ZREM', KEYS[2], '')
local over = 0 - tonumber(ARGV[1])
for list = 3, #KEYS do over = over + redis.call('LLEN', KEYS[list]) end
over = math.min(over, tonumber(ARGV[2]))
for list = #KEYS, 3, -1 do
  while #taken < over and take(KEYS[list], prefix, number, ARGV[5]) do end
end
return taken
