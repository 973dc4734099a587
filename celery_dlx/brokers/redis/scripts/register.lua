-- A message that BRPOP took becomes an unacknowledged delivery.
-- KEYS: unacked, unacked_index, deliveries   ARGV: tag, item, source queue as JSON, the message's own delivery tag
-- Returns how often the message was put back before.
--
-- The first write is one that a full server does not refuse (ZREM), so the rest is not refused either: the message has
-- left its list already, and its memory with it.
redis.call('ZREM', KEYS[2], ARGV[1])
-- Three elements, no exchange, the queue as routing key: a stock worker that restores this entry pushes it to exactly
-- this queue, without looking up any binding.
redis.call('HSET', KEYS[1], ARGV[1], '[' .. ARGV[2] .. ', "", ' .. ARGV[3] .. ']')
local now = redis.call('TIME')
redis.call('ZADD', KEYS[2], now[1] .. '.' .. string.format('%06d', now[2]), ARGV[1])
return tonumber(redis.call('HGET', KEYS[3], ARGV[4]) or '0')
