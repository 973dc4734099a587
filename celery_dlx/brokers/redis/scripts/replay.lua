-- Letters go back to their queues. KEYS: letters, payloads, records, stats, then the lists
-- ARGV: per letter its score as read, index of its list (from 1), bytes of its id and of what follows it, and priority and
--       retries, all between blanks; then all ids with what follows them, one after the other. That is the letter's lineage,
--       to be put into its message, if that has this priority and these retries; or, with priority -, the message to push.
-- A letter that someone else replayed, discarded or captured anew since it was read is left alone.
-- Returns how many letters were looked at, for it ends early when it has read and written two megabytes; the ids that are
-- not there as they were read; and 1 if the caller must write the next letter's message.
-- Removing comes first: after it a full server refuses nothing.
-- include causes
-- include splice
-- include lists
local looked, bytes, moved, stayed, unfit, chosen = 0, 0, {}, {}, 0, {}
local at, each = 1, '(%S+) (%d+) (%d+) (%d+) (%S+) (%d+)'
for read, list, id_bytes, more, priority, retries in string.gmatch(ARGV[1], each) do
  if bytes > 2097152 then break end
  local id = string.sub(ARGV[2], at, at + id_bytes - 1)
  if not chosen[id] then
    local score = redis.call('ZSCORE', KEYS[1], id)
    if score and tonumber(score) == tonumber(read) then
      local item = string.sub(ARGV[2], at + id_bytes, at + id_bytes + more - 1)
      if priority ~= '-' then
        local message = redis.call('HGET', KEYS[2], id) or ''
        bytes = bytes + #message
        item = spliced(message, item, priority, retries)
        if not item then
          unfit = 1
          break
        end
      end
      chosen[id] = true
      moved[#moved + 1] = id
      local pushed = items[4 + list]
      pushed[#pushed + 1] = item
      bytes = bytes + #item
    else
      stayed[#stayed + 1] = id
    end
  end
  looked = looked + 1
  at = at + id_bytes + more
end
if #moved > 0 then
  redis.call('ZREM', KEYS[1], unpack(moved))
  push()
  drop(moved, redis.call('HMGET', KEYS[3], unpack(moved)))
  redis.call('HINCRBY', KEYS[4], 'replayed', #moved)
end
return {looked, stayed, unfit}
