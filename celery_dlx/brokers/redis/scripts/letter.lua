-- Included after causes.lua: a letter enters its DLQ, in place of an earlier one with its id. `later`: microseconds added to
-- its time, for letters of one script keep their order.
local function add(id, record, reason, payload, later)
  local before = redis.call('HGET', KEYS[3], id)
  if before then leave(id, before) end
  local bytes = #payload - redis.call('HSTRLEN', KEYS[2], id)
  redis.call('HSET', KEYS[2], id, payload)
  redis.call('HSET', KEYS[3], id, record)
  local now = redis.call('TIME')
  local micros = now[2] + later
  local ms = now[1] * 1000 + math.floor(micros / 1000)
  -- Milliseconds with their fraction, as text (Lua's own numbers lose digits on the way): letters of one millisecond keep
  -- their order.
  local score = string.format('%d.%03d', ms, micros % 1000)
  redis.call('ZADD', KEYS[1], score, id)
  enter(id, score, record)
  redis.call('HINCRBY', KEYS[4], 'captured', 1)
  redis.call('HINCRBY', KEYS[4], 'reason:' .. reason, 1)
  redis.call('HINCRBY', KEYS[4], 'bytes', bytes)
end
