-- All letters of a DLQ are deleted. KEYS: letters, payloads, records, stats. Returns how many there were.
local count = redis.call('ZCARD', KEYS[1])
for _, fingerprint in ipairs(redis.call('ZRANGE', KEYS[1] .. ':causes', 0, -1)) do
  redis.call('UNLINK', KEYS[1] .. ':cause:' .. fingerprint)
end
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3], KEYS[1] .. ':causes')
redis.call('HDEL', KEYS[4], 'bytes')
if count > 0 then redis.call('HINCRBY', KEYS[4], 'discarded', count) end
return count
