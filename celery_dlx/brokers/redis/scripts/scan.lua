-- Letters in whose records all of some words stand; the others are not sent. Bounded in letters and bytes looked at.
-- KEYS: letters (all, or a cause's), records, payloads
-- ARGV: first and last score, '1' for the newest first, id and score of the last letter looked at before (or '' and ''),
--       '1' to send payloads, letters and bytes looked at at most, words
-- Returns id and score of the last letter looked at (score '': there are no more), and those that match: see pack.lua.
-- include pack
local MOST, BYTES = tonumber(ARGV[7]), tonumber(ARGV[8])
local newest, payloads = ARGV[3] == '1', ARGV[6] == '1'
local low = redis.call('ZCOUNT', KEYS[1], '-inf', '(' .. ARGV[1])
local high = redis.call('ZCOUNT', KEYS[1], '-inf', ARGV[2]) - 1
if ARGV[5] ~= '' then
  local score = redis.call('ZSCORE', KEYS[1], ARGV[4])
  if score and tonumber(score) == tonumber(ARGV[5]) then
    local rank = redis.call('ZRANK', KEYS[1], ARGV[4])
    if newest then high = math.min(high, rank - 1) else low = math.max(low, rank + 1) end
  elseif newest then -- It left: letters of its very score are looked at once more, and the caller knows them.
    high = math.min(high, redis.call('ZCOUNT', KEYS[1], '-inf', ARGV[5]) - 1)
  else
    low = math.max(low, redis.call('ZCOUNT', KEYS[1], '-inf', '(' .. ARGV[5]))
  end
end
if newest then low = math.max(low, high - MOST + 1) else high = math.min(high, low + MOST - 1) end
if low > high then return {'', '', '', ''} end
local found
if newest then
  local last = redis.call('ZCARD', KEYS[1]) - 1
  found = redis.call('ZREVRANGE', KEYS[1], last - high, last - low, 'WITHSCORES')
else
  found = redis.call('ZRANGE', KEYS[1], low, high, 'WITHSCORES')
end

local function matches(record)
  for i = 9, #ARGV do
    if not string.find(record, ARGV[i], 1, true) then return false end
  end
  return true
end

-- Some at a time: a command for each is dear, and so are large records that are not looked at any more.
local last_id, last_score, bytes, first = '', '', 0, 1
while first < #found and bytes <= BYTES do
  local ids = {}
  for i = first, math.min(first + 98, #found), 2 do ids[#ids + 1] = found[i] end
  local records = redis.call('HMGET', KEYS[2], unpack(ids))
  for i, id in ipairs(ids) do
    local score, record = found[first + 2 * i - 1], records[i] or ''
    last_id, last_score = id, score
    bytes = bytes + #record
    if matches(record) then
      local payload = payloads and redis.call('HGET', KEYS[3], id)
      bytes = bytes + #(payload or '')
      pack(id, score, record, payload)
    end
    if bytes > BYTES then break end
  end
  first = first + 2 * #ids
end
return {last_id, last_score, packed()}
