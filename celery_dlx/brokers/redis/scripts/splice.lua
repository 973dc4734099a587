-- Included by replay.lua: an item with its lineage put in after the other headers, and its retries at 0; nil for anything
-- that is not as kombu writes it, or needs more than that.
--
-- Inside JSON strings quotes are escaped, so `"key": ` is a key wherever it stands; one that stands there twice may be
-- that of a nested object. Quotes are many: keys are searched by a rarer character of theirs, the first after `before`.

local find, sub = string.find, string.sub

-- Whether there is a key, as far as can be told: one that ends the same counts.
local function has(item, ending, from) return find(item, ending, from, true) ~= nil end

-- Whether a key's value is `value`, or (`absent`) there is no such key; and where the value stands.
local function says(item, before, ending, from, value, absent)
  local at, last = find(item, ending, from, true)
  if not at then return absent end
  if sub(item, at - #before, at - 1) ~= before or find(item, ending, last + 1, true) then return false end
  local after = last + #value + 1
  return sub(item, last + 1, after - 1) == value and find(item, '^[,}]', after) ~= nil, last + 1, after
end

local function spliced(item, lineage, priority, retries)
  if sub(item, 1, 10) ~= '{"body": "' or sub(item, -2) ~= '}}' then return nil end
  local body_end = find(item, '"', 11, true)
  if not body_end then return nil end
  local escaped = find(item, '\\', 11, true)
  if escaped and escaped < body_end then return nil end
  local between = '^", "content%-encoding": "[^"\\]*", "content%-type": "[^"\\]*", "headers": {'
  local _, headers = find(item, between, body_end)
  if not headers then return nil end
  local close, properties = find(item, '}, "properties": {', headers, true)
  if not close or close == headers + 1 or has(item, '}, "properties": {', properties) then return nil end
  if has(item, '"headers": ', close) or has(item, '"body": ', close) then return nil end -- of two, the second counts
  -- Letters that need not be escaped may stand in any key.
  local escape = find(item, '\\u00', headers, true)
  while escape do
    if find(item, '^[2-7]', escape + 4) then return nil end
    escape = find(item, '\\u00', escape + 1, true)
  end
  -- Our own lineage, the broker's words and others: all headers that may have to be changed or left out.
  local at = headers
  while true do
    at = find(item, 'x-', at + 1, true)
    if not at then break end
    if sub(item, at - 1, at - 1) == '"' then return nil end
  end
  if has(item, 'vered": ', headers) then return nil end -- redelivered
  if not says(item, '"e', 'xpires": ', headers, 'null', true) then return nil end
  if not says(item, '"', 'priority": ', properties, priority, priority == '0') then return nil end
  local same, from, after = says(item, '"', 'retries": ', headers, retries, retries == '0')
  if not same or (from and from > close) then return nil end
  local told = ', "x-celery-dlx": ' .. lineage
  if retries == '0' then return sub(item, 1, close - 1) .. told .. sub(item, close) end
  return sub(item, 1, from - 1) .. '0' .. sub(item, after, close - 1) .. told .. sub(item, close)
end
