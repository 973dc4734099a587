-- A message becomes a dead letter, and the DLQ keeps within its caps.
-- KEYS: letters, payloads, records, stats, unacked, unacked_index, deliveries
-- ARGV: id, record, reason, max_length, max_age in ms, max_bytes or 0, force ('1' or ''),
--       tag or '', the message's own delivery tag or '', payload (without a tag, or in place of what the delivery holds)
-- With a tag the payload is moved out of the unacknowledged deliveries; returns 0 if it is not there any more, for then
-- another worker has the message. Without a tag the payload is given (the message was acknowledged early).
-- include item
-- include causes
-- include retention
-- include letter
local payload = ARGV[10]
if ARGV[8] ~= '' then
  local entry = redis.call('HGET', KEYS[5], ARGV[8])
  if not entry then
    redis.call('ZREM', KEYS[6], ARGV[8])
    return 0
  end
  if payload == '' then payload = item_of(entry) end
end
-- A full server refuses the first write that needs memory, and with it the whole script; after any other write it
-- refuses nothing (https://redis.io/docs/latest/commands/eval/). Forced, such a write comes first.
if ARGV[7] == '1' then redis.call('HDEL', KEYS[4], '') end
add(ARGV[1], ARGV[2], ARGV[3], payload, 0)
if ARGV[8] ~= '' then
  redis.call('HDEL', KEYS[5], ARGV[8])
  redis.call('ZREM', KEYS[6], ARGV[8])
end
if ARGV[9] ~= '' then redis.call('HDEL', KEYS[7], ARGV[9], ARGV[9] .. ':started') end
keep_within(tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]))
return 1
