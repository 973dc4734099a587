-- An unacknowledged delivery is [<item>, "", "<queue>"]: the item's bytes end at the last such separator, for inside the
-- queue's name quotes are escaped.
local function item_of(entry)
  local at, from = nil, 1
  while true do
    local found = string.find(entry, ', "", "', from, true)
    if not found then return string.sub(entry, 2, at - 1) end
    at, from = found, found + 1
  end
end
