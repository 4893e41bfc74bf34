#!lua flags=no-writes
-- Reads a portion of a table in order, and which revision it is of.
--
-- KEYS: meta, the table's order, its rows
-- ARGV: where to begin, as ZRANGE BYLEX has it; how many rows, and about how many bytes
local is = redis.call('HMGET', KEYS[1], 'rev', 'nonce')
local out = {is[1] or '0', is[2] or '', '0'}
local from, rows, room = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
while rows > 0 and room > 0 do
  local want = math.min(rows, 50)
  local keys = redis.call('ZRANGE', KEYS[2], from, '+', 'BYLEX', 'LIMIT', 0, want)
  if #keys > 0 then
    local values = redis.call('HMGET', KEYS[3], unpack(keys))
    for i, key in ipairs(keys) do
      out[#out + 1] = key
      out[#out + 1] = values[i]
      room = room - #key - #(values[i] or '')
    end
    from = '(' .. keys[#keys]
  end
  if #keys < want then
    return out
  end
  rows = rows - want
end
out[3] = '1'
return out
