-- Included by the scripts that add letters or take them away. KEYS[1] to KEYS[4]: letters, payloads, records, stats.
-- Beside them, by names made here: `<letters>:causes`, how many letters each fingerprint has, and `<letters>:cause:<fingerprint>`,
-- which ones, scored as in `letters`. Keys that a script makes up are fine but in a cluster, where all have one slot anyway.

-- Records are our own compact JSON: inside its strings quotes are escaped, so the first match is the key.
local function said(record, key)
  return string.sub(string.match(record, '"' .. key .. '":"([^"\\]*)"') or '', 1, 200)
end

local function cause_key(fingerprint) return KEYS[1] .. ':cause:' .. fingerprint end

local function enter(id, score, record)
  local fingerprint = said(record, 'fingerprint')
  if redis.call('ZADD', cause_key(fingerprint), score, id) == 1 then
    redis.call('ZINCRBY', KEYS[1] .. ':causes', 1, fingerprint)
  end
end

local function leave(id, record)
  local fingerprint = said(record, 'fingerprint')
  if redis.call('ZREM', cause_key(fingerprint), id) == 1 then
    if tonumber(redis.call('ZINCRBY', KEYS[1] .. ':causes', -1, fingerprint)) <= 0 then
      redis.call('ZREM', KEYS[1] .. ':causes', fingerprint)
    end
  end
end

-- Removes a letter from everything but the letters themselves; returns the bytes of messages held after it.
local function drop(id, record)
  leave(id, record)
  local bytes = redis.call('HSTRLEN', KEYS[2], id)
  redis.call('HDEL', KEYS[2], id)
  redis.call('HDEL', KEYS[3], id)
  -- 0 - n, for -0 is "-0" in Lua, and no integer to Redis: an item may be empty.
  return redis.call('HINCRBY', KEYS[4], 'bytes', 0 - bytes)
end
