-- Included by the scripts that add letters or take them away. KEYS[1] to KEYS[4]: letters, payloads, records, stats.
-- Beside them, by names made here: `<letters>:causes`, how many letters each fingerprint has, and `<letters>:cause:<fingerprint>`,
-- which ones, scored as in `letters`. Keys that a script makes up are fine but in a cluster, where all have one slot anyway.

-- Records are our own compact JSON: inside its strings quotes are escaped, so the first match is the key.
local function said(record, key)
  local opening, from = '"' .. key .. '":"', 1
  while true do
    local _, last = string.find(record, opening, from, true)  -- plain: a pattern is tried at every character
    if not last then return '' end
    local value = string.match(record, '^([^"\\]*)"', last + 1)
    if value then return string.sub(value, 1, 200) end
    from = last + 1
  end
end

local function cause_key(fingerprint) return KEYS[1] .. ':cause:' .. fingerprint end

local function enter(id, score, record)
  local fingerprint = said(record, 'fingerprint')
  if redis.call('ZADD', cause_key(fingerprint), score, id) == 1 then
    redis.call('ZINCRBY', KEYS[1] .. ':causes', 1, fingerprint)
  end
end

-- Letters of one fingerprint leave the index; returns how many were in it.
local function leave_cause(fingerprint, ids)
  local gone = redis.call('ZREM', cause_key(fingerprint), unpack(ids))
  if gone > 0 and tonumber(redis.call('ZINCRBY', KEYS[1] .. ':causes', 0 - gone, fingerprint)) <= 0 then
    redis.call('ZREM', KEYS[1] .. ':causes', fingerprint)
  end
  return gone
end

local function leave(id, record) leave_cause(said(record, 'fingerprint'), {id}) end

-- Letters leave the index by what their records say.
local function leave_causes(ids, records)
  local fingerprints, of_cause = {}, {}
  for i, id in ipairs(ids) do
    local fingerprint = said(records[i] or '', 'fingerprint')
    if not of_cause[fingerprint] then
      fingerprints[#fingerprints + 1], of_cause[fingerprint] = fingerprint, {}
    end
    table.insert(of_cause[fingerprint], id)
  end
  for _, fingerprint in ipairs(fingerprints) do leave_cause(fingerprint, of_cause[fingerprint]) end
end

-- Removes letters (at most some hundreds) from everything but the letters themselves, each kind of key by one command.
-- Returns the bytes of messages held after it.
local function drop(ids, records)
  local bytes = 0
  for _, id in ipairs(ids) do bytes = bytes + redis.call('HSTRLEN', KEYS[2], id) end
  leave_causes(ids, records)
  redis.call('HDEL', KEYS[2], unpack(ids))
  redis.call('HDEL', KEYS[3], unpack(ids))
  -- 0 - n, for -0 is "-0" in Lua, and no integer to Redis: an item may be empty.
  return redis.call('HINCRBY', KEYS[4], 'bytes', 0 - bytes)
end
