#!lua flags=no-writes
-- Reads a portion of a list. The rows' keys are made here of what the list says: they are
-- in the slot of the others.
--
-- KEYS: the list
-- ARGV: what the keys of rows begin with; 'up' or 'down', where to begin, how many rows,
--       about how many bytes
local prefix, way, from, rows, room = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local out = {'0'}
while rows > 0 and room > 0 do
  local want = math.min(rows, 50)
  local found
  if way == 'up' then
    found = redis.call('ZRANGE', KEYS[1], from, '+', 'BYLEX', 'LIMIT', 0, want)
  else
    found = redis.call('ZRANGE', KEYS[1], from, '-', 'BYLEX', 'REV', 'LIMIT', 0, want)
  end
  for _, place in ipairs(found) do
    local stop = string.find(place, '\0\0', 9, true)
    local tbl = string.gsub(string.sub(place, 9, stop - 1), '%z\255', '\0')
    local value = redis.call('HGET', prefix .. tbl, string.sub(place, stop + 2))
    out[#out + 1] = place
    out[#out + 1] = value
    room = room - #place - #(value or '')
    from = '(' .. place
  end
  if #found < want then
    return out
  end
  rows = rows - want
end
if rows > 0 then
  out[1] = '1' -- there is more
end
return out
