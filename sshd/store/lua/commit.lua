#!lua
-- Applies a batch if the writer, its turn and the revision are still what it was made for.
-- It knows nothing of what is in the batch. The flags of the first line's absence matter:
-- Redis refuses the whole script beforehand when it is full, read-only or cannot save, so
-- that nothing is ever applied by halves.
--
-- KEYS: meta, log, and those the batch names
-- ARGV: epoch, turn, revision before and after, nonce, the rows changed; then commands,
--       each after the number of its words
local meta, log = KEYS[1], KEYS[2]
local epoch, turn, prev, next_, nonce, changed = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local is = redis.call('HMGET', meta, 'epoch', 'turn', 'rev')
if is[1] ~= epoch or is[2] ~= turn or is[3] ~= prev then
  local e = redis.call('XRANGE', log, next_ .. '-0', next_ .. '-0')
  if e[1] and e[1][2][2] == nonce then
    return {'1', epoch, next_} -- it was sent twice
  end
  return {'0', is[1] or '', is[3] or '0'}
end

-- leave takes rows out of the lists they stand in.
local function leave(places, lists, from, to)
  local stand = redis.call('HMGET', places, unpack(ARGV, from, to))
  local gone = {}
  for i, s in ipairs(stand) do
    if s then
      local p = cmsgpack.unpack(s)
      for j = 2, #p do
        redis.call('ZREM', lists .. p[j], p[1])
      end
      gone[#gone + 1] = ARGV[from + i - 1]
    end
  end
  if #gone > 0 then
    redis.call('HDEL', places, unpack(gone))
  end
end

-- put writes rows that may be there already; if one of them is new, all go into the order.
local function put(rows, order, from, to)
  if redis.call('HSET', rows, unpack(ARGV, from, to)) > 0 then
    local keys = {}
    for i = from, to, 2 do
      keys[#keys + 1] = 0
      keys[#keys + 1] = ARGV[i]
    end
    redis.call('ZADD', order, unpack(keys))
  end
end

local i = 7
while ARGV[i] do
  local first, last = i + 1, i + tonumber(ARGV[i])
  local word = ARGV[first]
  if word == 'leave' then
    leave(ARGV[first + 1], ARGV[first + 2], first + 3, last)
  elseif word == 'put' then
    put(ARGV[first + 1], ARGV[first + 2], first + 3, last)
  else
    redis.call(unpack(ARGV, first, last))
  end
  i = last + 1
end
redis.call('HSET', meta, 'rev', next_, 'nonce', nonce)
redis.call('XADD', log, 'MAXLEN', '~', 2048, next_ .. '-0', 'n', nonce, 'k', changed)
return {'1', epoch, next_}
