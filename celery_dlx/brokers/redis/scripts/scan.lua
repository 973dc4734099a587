-- Letters in whose records all of some words stand; the others are not sent. Bounded in letters and bytes looked at.
-- KEYS: letters (all, or a cause's), records, payloads
-- ARGV: first and last score, '1' for the newest first, id and score of the last letter looked at before (or '' and ''),
--       '1' to send payloads, words
-- Returns id and score of the last letter looked at (score '': there are no more);
-- then id, score and record of each that matches, and its payload if that was asked for (nil: there is none).
local MOST, BYTES = 1000, 2000000
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
if low > high then return {'', ''} end
local found
if newest then
  local last = redis.call('ZCARD', KEYS[1]) - 1
  found = redis.call('ZREVRANGE', KEYS[1], last - high, last - low, 'WITHSCORES')
else
  found = redis.call('ZRANGE', KEYS[1], low, high, 'WITHSCORES')
end

local function matches(record)
  for i = 7, #ARGV do
    if not string.find(record, ARGV[i], 1, true) then return false end
  end
  return true
end

local answer, bytes = {'', ''}, 0
for i = 1, #found, 2 do
  local id, score = found[i], found[i + 1]
  local record = redis.call('HGET', KEYS[2], id) or ''
  answer[1], answer[2] = id, score
  bytes = bytes + #record
  if matches(record) then
    local at = #answer
    answer[at + 1], answer[at + 2], answer[at + 3] = id, score, record
    if payloads then
      local payload = redis.call('HGET', KEYS[3], id)
      answer[at + 4] = payload
      bytes = bytes + #(payload or '')
    end
  end
  if bytes > BYTES then break end
end
return answer
