-- Letters by their ids. KEYS: letters, records, payloads   ARGV: '1' to send payloads, ids (at most some hundreds)
-- Returns how many ids were looked at, for it ends early when it has some megabytes; and those that are there: see pack.lua.
-- include pack
local looked, bytes = 0, 0
while looked + 1 < #ARGV and bytes <= 2000000 do
  local ids = {unpack(ARGV, looked + 2, math.min(looked + 51, #ARGV))}
  local scores, records = redis.call('ZMSCORE', KEYS[1], unpack(ids)), redis.call('HMGET', KEYS[2], unpack(ids))
  for i, id in ipairs(ids) do
    if scores[i] then
      local record, payload = records[i] or '', ARGV[1] == '1' and redis.call('HGET', KEYS[3], id)
      bytes = bytes + #record + #(payload or '')
      pack(id, scores[i], record, payload)
    end
    looked = looked + 1
    if bytes > 2000000 then break end
  end
end
return {looked, packed()}
