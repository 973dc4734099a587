-- Included by the scripts that answer with letters: as two strings, for a client reads many small ones slowly.
local numbers, parts = {}, {}

-- Numbers of each: bytes of its id, score, bytes of its record, bytes of its payload (or -: there is none, or nobody asked).
local function pack(id, score, record, payload)
  local at = #numbers
  numbers[at + 1], numbers[at + 2], numbers[at + 3], numbers[at + 4] = #id, score, #record, payload and #payload or '-'
  at = #parts
  parts[at + 1], parts[at + 2], parts[at + 3] = id, record, payload or ''
end

local function packed() return table.concat(numbers, ' '), table.concat(parts) end
