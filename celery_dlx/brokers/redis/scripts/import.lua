-- A letter that was exported comes back. KEYS: letters, payloads, records, stats; ARGV: id, score, record, payload
-- Returns 0 if it is there: what is there was not exported, and may be newer.
-- include causes
if redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[4])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
enter(ARGV[1], ARGV[2], ARGV[3])
redis.call('HINCRBY', KEYS[4], 'bytes', #ARGV[4])
redis.call('HINCRBY', KEYS[4], 'imported', 1)
return 1
