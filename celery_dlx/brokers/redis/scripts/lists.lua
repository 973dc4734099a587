-- Included by the scripts that send letters back. KEYS[5] and on: the lists their messages are pushed to.
local items = {}
for list = 5, #KEYS do
  -- Pushing must not fail once letters were removed: whatever else has a list's name, nothing leaves then.
  local kind = redis.call('TYPE', KEYS[list]).ok
  if kind ~= 'list' and kind ~= 'none' then
    return redis.error_reply('WRONGTYPE ' .. KEYS[list] .. ' is a ' .. kind .. ' and no list: no letter moved')
  end
  items[list] = {}
end

-- At once after the letters were removed: what fails after that (somebody wrote into our keys) costs a letter's rest, no message.
local function push()
  for list = 5, #KEYS do
    if #items[list] > 0 then redis.call('LPUSH', KEYS[list], unpack(items[list])) end
  end
end
