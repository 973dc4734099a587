-- Forget deliveries. KEYS: unacked, unacked_index, then deliveries of each queue
-- ARGV: per delivery its tag, its queue (from 1), the message's own delivery tag or '' (it has no count to forget)
-- Returns how many were not there, for someone restored them meanwhile: then they are theirs and nothing is touched.
local gone = 0
for at = 1, #ARGV, 3 do
  local counts, own_tag = KEYS[2 + ARGV[at + 1]], ARGV[at + 2]
  redis.call('ZREM', KEYS[2], ARGV[at])
  if redis.call('HDEL', KEYS[1], ARGV[at]) == 0 then
    gone = gone + 1
  elseif own_tag ~= '' then
    redis.call('HDEL', counts, own_tag, own_tag .. ':started')
  end
end
return gone
