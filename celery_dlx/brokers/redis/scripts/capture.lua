-- A message becomes a dead letter, and the DLQ keeps within its caps.
-- KEYS: letters, payloads, records, stats, unacked, unacked_index, deliveries
-- ARGV: id, record, reason, max_length, max_age in ms, max_bytes or 0, force ('1' or ''),
--       tag or '', the message's own delivery tag or '', payload (only without a tag)
-- With a tag the payload is moved out of the unacknowledged deliveries; returns 0 if it is not there any more, for then
-- another worker has the message. Without a tag the payload is given (the message was acknowledged early).
local payload = ARGV[10]
if ARGV[8] ~= '' then
  local entry = redis.call('HGET', KEYS[5], ARGV[8])
  if not entry then
    redis.call('ZREM', KEYS[6], ARGV[8])
    return 0
  end
  local at, from = nil, 1
  while true do
    local found = string.find(entry, ', "", "', from, true)
    if not found then break end
    at, from = found, found + 1
  end
  payload = string.sub(entry, 2, at - 1)
end
-- A full server refuses the first write that needs memory, and with it the whole script; after any other write it
-- refuses nothing (https://redis.io/docs/latest/commands/eval/). Forced, such a write comes first.
if ARGV[7] == '1' then redis.call('ZREM', KEYS[1], '') end
local bytes = #payload - redis.call('HSTRLEN', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], payload)
redis.call('HSET', KEYS[3], ARGV[1], ARGV[2])
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
-- Milliseconds with their fraction, as text (Lua's own numbers lose digits on the way): letters of one millisecond keep
-- their order.
redis.call('ZADD', KEYS[1], string.format('%d.%03d', ms, now[2] % 1000), ARGV[1])
if ARGV[8] ~= '' then
  redis.call('HDEL', KEYS[5], ARGV[8])
  redis.call('ZREM', KEYS[6], ARGV[8])
end
if ARGV[9] ~= '' then redis.call('HDEL', KEYS[7], ARGV[9], ARGV[9] .. ':started') end
redis.call('HINCRBY', KEYS[4], 'captured', 1)
redis.call('HINCRBY', KEYS[4], 'reason:' .. ARGV[3], 1)
local total = redis.call('HINCRBY', KEYS[4], 'bytes', bytes)

-- 0 - n, for -0 is "-0" in Lua, and no integer to Redis: an item may be empty.
local function evict(ids, counter)
  for _, id in ipairs(ids) do
    total = redis.call('HINCRBY', KEYS[4], 'bytes', 0 - redis.call('HSTRLEN', KEYS[2], id))
    redis.call('ZREM', KEYS[1], id)
    redis.call('HDEL', KEYS[2], id)
    redis.call('HDEL', KEYS[3], id)
  end
  if #ids > 0 then redis.call('HINCRBY', KEYS[4], counter, #ids) end
end

-- At most 500 a call: a cap that was lowered is reached step by step, without blocking the server.
evict(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ms - tonumber(ARGV[5]), 'LIMIT', 0, 500), 'evicted_max_age')
local over = redis.call('ZCARD', KEYS[1]) - tonumber(ARGV[4])
if over > 0 then evict(redis.call('ZRANGE', KEYS[1], 0, math.min(over, 500) - 1), 'evicted_max_length') end
local cap, rounds = tonumber(ARGV[6]), 0
while cap > 0 and total > cap and rounds < 500 and redis.call('ZCARD', KEYS[1]) > 1 do
  evict(redis.call('ZRANGE', KEYS[1], 0, 0), 'evicted_max_bytes')
  rounds = rounds + 1
end
return 1
