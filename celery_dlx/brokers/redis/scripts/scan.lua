-- Letters in whose records all of some words stand; the others are not sent. Bounded in letters looked at and bytes sent.
-- KEYS: letters (all, or a cause's), records, payloads
-- ARGV: first and last score, '1' for the newest first, id and score of the last letter looked at before (or ''),
--       '1' to send payloads, words
-- Returns id and score of the last letter looked at ('' at the end);
-- then id, score, record, payload (or '') of each that matches.
local MOST, BYTES = 1000, 1000000
local newest, payloads = ARGV[3] == '1', ARGV[6] == '1'
local low = redis.call('ZCOUNT', KEYS[1], '-inf', '(' .. ARGV[1])
local high = redis.call('ZCOUNT', KEYS[1], '-inf', ARGV[2]) - 1
if ARGV[4] ~= '' then
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
if low > high then return {'', ''} end
local found = redis.call(newest and 'ZREVRANGE' or 'ZRANGE', KEYS[1],
  newest and redis.call('ZCARD', KEYS[1]) - 1 - high or low, newest and redis.call('ZCARD', KEYS[1]) - 1 - low or high, 'WITHSCORES')
local ids = {}
for i = 1, #found, 2 do ids[#ids + 1] = found[i] end
local records = redis.call('HMGET', KEYS[2], unpack(ids))

local function matches(record)
  if not record then return false end
  for i = 7, #ARGV do
    if not string.find(record, ARGV[i], 1, true) then return false end
  end
  return true
end

local answer, bytes = {'', ''}, 0
for i, id in ipairs(ids) do
  answer[1], answer[2] = id, found[2 * i]
  if matches(records[i]) then
    local payload = payloads and redis.call('HGET', KEYS[3], id) or ''
    bytes = bytes + #records[i] + #payload
    for _, each in ipairs({id, found[2 * i], records[i], payload}) do answer[#answer + 1] = each end
    if bytes > BYTES then break end
  end
end
return answer
