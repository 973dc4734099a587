-- Letters go back to their queue as they are: the very bytes of their messages, of which nobody reads more than the priority.
-- KEYS: letters, payloads, records, stats, then the lists
-- ARGV: which list (from 1) each priority from 0 to 9 goes to, and a message that says none, as JSON; a byte per letter: which
--       cause it is of (from 1); their ids, between blanks; per letter the bytes of its id and the millisecond it died in, as
--       JSON; the first and last score they have, as ZRANGE takes them; the last letter of the lot before, that must have left, and
--       the millisecond it died in, or '' and '': its answer is not known yet; then the causes.
-- A letter that someone else replayed or discarded, or that died again since it was selected, is left alone: what comes back as
-- it was dies under the id it had, and must not leave again because somebody asks whether it left.
-- Returns how many letters were looked at, for it ends early when it has two megabytes; the ids that are not there as they
-- were selected; and 1 if the caller must read the next letter's message.
-- Removing comes first: after it a full server refuses nothing.
-- include causes
-- include priority
-- include lists
local LOT, BYTES = 25, 2097152
local of_priority, count = cjson.decode(ARGV[1]), #ARGV[2]

-- As the caller reads a score: whole milliseconds, 0 for what is no time.
local function died_in(score)
  score = tonumber(score)
  if score == math.huge or score == -math.huge then return 0 end
  return score < 0 and math.ceil(score) or math.floor(score)
end

local before = ARGV[8] ~= '' and redis.call('ZSCORE', KEYS[1], ARGV[7])
if before and died_in(before) == tonumber(ARGV[8]) then return {0, {}, 0} end -- nobody is overtaken

-- Mostly they are all there, one after the other, and nothing else died in that time: then no score need be looked at.
local ids, there = redis.call('ZRANGE', KEYS[1], ARGV[5], ARGV[6], 'BYSCORE', 'LIMIT', 0, count), nil
if #ids ~= count or table.concat(ids, ' ') ~= ARGV[3] then
  local numbers, at = cjson.decode(ARGV[4]), 1
  for n = 1, count do
    local bytes = numbers[2 * n - 1]
    ids[n] = string.sub(ARGV[3], at, at + bytes - 1)
    at = at + bytes + 1
  end
  there = redis.call('ZMSCORE', KEYS[1], unpack(ids))
  for n = 1, count do there[n] = there[n] and died_in(there[n]) == numbers[2 * n] end
end

local looked, bytes, largest, moved, stayed, of_cause, unfit = 0, 0, 0, {}, {}, {}, 0
while looked < count and bytes <= BYTES and unfit == 0 do
  -- Some at a time: a command for each is dear, and so are large messages that are not looked at any more.
  local most = largest == 0 and 1 or math.max(1, math.min(LOT, math.floor((BYTES - bytes) / largest)))
  local messages = redis.call('HMGET', KEYS[2], unpack(ids, looked + 1, math.min(looked + most, count)))
  for i = 1, #messages do
    local message, n = messages[i], looked + 1
    local id = ids[n]
    if there and not there[n] then
      stayed[#stayed + 1] = id
    else
      local priority = message and priority_of(message)
      if not priority then
        unfit = 1
        break
      end
      local list = items[4 + of_priority[priority == '' and 11 or priority + 1]]
      list[#list + 1] = message
      moved[#moved + 1] = id
      local cause = string.byte(ARGV[2], n)
      local of_it = of_cause[cause]
      if of_it then of_it[#of_it + 1] = id else of_cause[cause] = {id} end
      bytes = bytes + #message
      if #message > largest then largest = #message end
    end
    looked = n
    if bytes > BYTES then break end
  end
end
if #moved > 0 then
  redis.call('ZREM', KEYS[1], unpack(moved))
  push()
  local left = 0
  for cause, of_it in pairs(of_cause) do left = left + leave_cause(ARGV[8 + cause], of_it) end
  -- Where they were selected by another word than their records' own, these are asked.
  if left < #moved then leave_causes(moved, redis.call('HMGET', KEYS[3], unpack(moved))) end
  redis.call('HDEL', KEYS[2], unpack(moved))
  redis.call('HDEL', KEYS[3], unpack(moved))
  redis.call('HINCRBY', KEYS[4], 'bytes', 0 - bytes)
  redis.call('HINCRBY', KEYS[4], 'replayed', #moved)
end
return {looked, stayed, unfit}
