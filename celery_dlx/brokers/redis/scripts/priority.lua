-- Included by raw.lua: a message's priority, as kombu would read it out of its envelope: a digit, '' where it says none, or nil
-- where that cannot be told without decoding it.
--
-- Quotes inside JSON strings are escaped, so `"key": ` is a key wherever it stands; whose key, the braces tell. After the
-- properties begin, kombu writes one flat object at most, then their end and the envelope's; where there is a brace more, if
-- only inside a string, this looks no further. Keys are searched by a rarer character than their quotes, which are many.

local find, match = string.find, string.match

local function priority_of(item)
  local _, opened = find(item, '}, "properties": {', 1, true)
  if not opened then return nil end
  local nested, closed = find(item, '{', opened + 1, true), opened
  if nested then
    closed = find(item, '}', nested + 1, true)
    if not closed or find(item, '{', nested + 1, true) then return nil end
  end
  if find(item, '}}', closed + 1, true) ~= #item - 1 then return nil end
  -- A letter of the key itself may be escaped.
  if find(item, '\\u00', opened + 1, true) and find(item, '\\u00[67]', opened + 1) then return nil end
  local at, last = find(item, 'priority": ', opened + 1, true)
  if not at then return '' end
  if nested and at > nested and at < closed or find(item, 'priority": ', last, true) then return nil end
  return match(item, '^[ {]"priority": (%d)[,}]', at - 2)
end
