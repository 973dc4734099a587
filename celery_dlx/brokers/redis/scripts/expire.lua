-- What waits for too long leaves its list and becomes unacknowledged deliveries, oldest first, at most so many.
-- KEYS: unacked, unacked_index, marks, list
-- ARGV: messages taken at most, prefix of the tags, number before the first tag's, the queue's name as JSON,
--       milliseconds a message may wait, milliseconds between marks
-- Returns the items, whose tags are numbered in this order.
-- Sent a second time, because its answer was lost, it takes no more, and answers what it did.
--
-- Messages do not say since when they wait. But lists grow on the left only: whatever lies right of the message that was
-- the newest at some time came before it. So now and then that message and the time are noted, as a mark.
-- include take
local most, prefix, number = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
if took_before(prefix, number) then return taken end
redis.call('ZREM', KEYS[2], '')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function split(mark)
  local at = string.find(mark, ' ', 1, true)
  return tonumber(string.sub(mark, 1, at - 1)), string.sub(mark, at + 1)
end

-- Marks of a clock that was set back since tell nothing, and would keep others from being noted until it is there again.
while true do
  local mark = redis.call('LINDEX', KEYS[3], 0)
  if not mark or split(mark) <= now then break end
  redis.call('LPOP', KEYS[3])
end

while #taken < most do
  local mark = redis.call('LINDEX', KEYS[3], -1)
  if not mark then break end
  local since, newest = split(mark)
  if now - since <= tonumber(ARGV[5]) then break end
  -- From the right: what waited for that long is nearly all gone, if consumers keep up.
  local at = redis.call('LPOS', KEYS[4], newest, 'RANK', -1)
  local over = at and redis.call('LLEN', KEYS[4]) - at or 0
  for _ = 1, math.min(over, most - #taken) do
    take(KEYS[4], prefix, number, ARGV[4])
    over = over - 1
  end
  if over > 0 then break end
  redis.call('RPOP', KEYS[3])
end

local newest, last = redis.call('LINDEX', KEYS[4], 0), redis.call('LINDEX', KEYS[3], 0)
if newest then
  local since, noted
  if last then since, noted = split(last) end
  if not last or (noted ~= newest and now - since >= tonumber(ARGV[6])) then
    redis.call('LPUSH', KEYS[3], string.format('%d', now) .. ' ' .. newest)
    redis.call('PEXPIRE', KEYS[3], 2 * ARGV[5] + 60000)
  end
end
return taken
