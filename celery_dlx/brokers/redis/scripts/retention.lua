-- Included after causes.lua: the caps of a DLQ. What goes is counted, by cap and by cause.

local function evict(ids, counter)
  if #ids == 0 then return end
  local records = redis.call('HMGET', KEYS[3], unpack(ids))
  redis.call('ZREM', KEYS[1], unpack(ids))
  local total = drop(ids, records)
  for i in ipairs(ids) do
    local record = records[i] or ''
    local label = said(record, 'fingerprint') .. ' ' .. said(record, 'reason') .. ' ' .. said(record, 'task')
    redis.call('ZINCRBY', KEYS[1] .. ':evicted', 1, label)
  end
  redis.call('HINCRBY', KEYS[4], counter, #ids)
  -- Of so many causes the rarest are forgotten: anybody can make up new ones.
  redis.call('ZREMRANGEBYRANK', KEYS[1] .. ':evicted', 0, -1001)
  return total
end

-- At most 500 letters by each cap: one that was lowered is reached step by step, without blocking the server.
-- Returns how many went.
local function keep_within(max_length, max_age, max_bytes)
  local time = redis.call('TIME')
  local ms = time[1] * 1000 + math.floor(time[2] / 1000)
  local old = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ms - max_age, 'LIMIT', 0, 500)
  evict(old, 'evicted_max_age')
  local gone, over = #old, redis.call('ZCARD', KEYS[1]) - max_length
  if over > 0 then
    local ids = redis.call('ZRANGE', KEYS[1], 0, math.min(over, 500) - 1)
    evict(ids, 'evicted_max_length')
    gone = gone + #ids
  end
  if max_bytes > 0 then
    local total, rounds = tonumber(redis.call('HGET', KEYS[4], 'bytes') or '0'), 0
    while total > max_bytes and rounds < 500 and redis.call('ZCARD', KEYS[1]) > 1 do
      total = evict(redis.call('ZRANGE', KEYS[1], 0, 0), 'evicted_max_bytes')
      rounds = rounds + 1
    end
    gone = gone + rounds
  end
  return gone
end
