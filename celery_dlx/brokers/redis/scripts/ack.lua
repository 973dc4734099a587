-- Forget a delivery. KEYS: unacked, unacked_index, deliveries   ARGV: tag, the message's own delivery tag or ''
-- Returns 1, or 0 if someone restored the message meanwhile: then it is theirs and nothing is touched.
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
if ARGV[2] ~= '' then redis.call('HDEL', KEYS[3], ARGV[2], ARGV[2] .. ':started') end
return 1
