-- Messages move from their lists to the unacknowledged deliveries, at most as many as there is credit.
-- KEYS: unacked, unacked_index, then per queue its deliveries, then the lists, those of one priority together
-- ARGV: credit, prefix of the tags, number before the first tag's, queues, '1' to take turns between queues or '',
--       then per queue its name as JSON
-- Returns the queues (from 1) of which some messages came back before; then queue and item of each claimed message, whose
-- tags are numbered in this order; then 1 if there may be more. It ends early when it has a megabyte: the server waits.
--
-- As in register.lua: first a write that a full server does not refuse, and entries that a stock worker restores rightly.
local credit, number, queues = tonumber(ARGV[1]), tonumber(ARGV[3]), tonumber(ARGV[4])
redis.call('ZREM', KEYS[2], '')
local now = redis.call('TIME')
now = now[1] .. '.' .. string.format('%06d', now[2])
local bytes, counted, claimed, lists = 0, {}, {}, #KEYS - 2 - queues
for queue = 1, queues do
  if redis.call('EXISTS', KEYS[2 + queue]) == 1 then counted[#counted + 1] = queue end
end

local function take(list, queue)
  -- A key that is no list is for people to look at; it must not keep the other queues from working.
  local item = redis.pcall('RPOP', KEYS[2 + queues + list])
  if not item or type(item) == 'table' then return false end
  number, credit, bytes = number + 1, credit - 1, bytes + #item
  if bytes > 1048576 then credit = 0 end
  local tag = ARGV[2] .. string.format('%d', number)
  redis.call('HSET', KEYS[1], tag, '[' .. item .. ', "", ' .. ARGV[5 + queue] .. ']')
  redis.call('ZADD', KEYS[2], now, tag)
  claimed[#claimed + 1] = queue
  claimed[#claimed + 1] = item
  return true
end

for first = 1, lists, queues do
  local open = {}
  for queue = 1, queues do open[queue] = queue end
  while #open > 0 and credit > 0 do
    local left = {}
    for _, queue in ipairs(open) do
      while credit > 0 do
        if not take(first + queue - 1, queue) then break end
        if ARGV[5] == '1' then
          left[#left + 1] = queue
          break
        end
      end
    end
    open = left
  end
  if credit <= 0 then break end
end
return {counted, claimed, credit <= 0 and 1 or 0}
