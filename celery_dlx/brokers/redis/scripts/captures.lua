-- Messages that are in no list and no delivery become dead letters of one DLQ, which keeps within its caps.
-- KEYS: letters, payloads, records, stats
-- ARGV: max_length, max_age in ms, max_bytes or 0; bytes of each letter's id, record, reason and payload, between blanks; then
--       all these, one after the other
-- A full server refuses all of it: see capture.lua.
-- include causes
-- include retention
-- include letter
local at, count = 1, 0
local function part(bytes)
  at = at + bytes
  return string.sub(ARGV[5], at - bytes, at - 1)
end
for id, record, reason, payload in string.gmatch(ARGV[4], '(%d+) (%d+) (%d+) (%d+)') do
  add(part(id), part(record), part(reason), part(payload), count)
  count = count + 1
end
keep_within(tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]))
return count
