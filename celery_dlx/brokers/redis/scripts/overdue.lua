-- Deliveries that were not renewed for long, newest first. KEYS: unacked, unacked_index
-- ARGV: seconds, deliveries at most
-- Returns tags and entries (or '') in turn, and 1 if there may be more. It ends early when it has a megabyte.
local now = redis.call('TIME')
local before = string.format('%.6f', now[1] + now[2] / 1000000 - ARGV[1])
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
