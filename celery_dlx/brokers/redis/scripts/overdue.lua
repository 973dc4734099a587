-- Deliveries that were not renewed for long, newest first. KEYS: unacked, unacked_index
-- ARGV: seconds, deliveries at most
-- Returns tags and entries (or '') in turn, and 1 if there may be more. It ends early when it has a megabyte.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
-- A clock that was set back leaves ages in the future. They begin anew, or what was held would wait until they are reached;
-- a minute is for stock workers, who go by clocks of their own.
local ahead = redis.call('ZRANGEBYSCORE', KEYS[2], string.format('(%.6f', now + 60), '+inf', 'LIMIT', 0, ARGV[2])
if #ahead > 0 then redis.call('ZREM', KEYS[2], '') end  -- first what a full server does not refuse: see capture.lua
for _, tag in ipairs(ahead) do redis.call('ZADD', KEYS[2], string.format('%.6f', now), tag) end
local before = string.format('%.6f', now - ARGV[1])
local tags = redis.call('ZREVRANGEBYSCORE', KEYS[2], before, '-inf', 'LIMIT', 0, ARGV[2])
local found, bytes = {}, 0
for _, tag in ipairs(tags) do
  local entry = redis.call('HGET', KEYS[1], tag) or ''
  found[#found + 1] = tag
  found[#found + 1] = entry
  bytes = bytes + #entry
  if bytes > 1048576 then break end
end
return {found, (#found / 2 < #tags or #tags == tonumber(ARGV[2])) and 1 or 0}
