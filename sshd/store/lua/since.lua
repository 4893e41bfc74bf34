#!lua flags=no-writes
-- Reads what rows of some tables, that were changed after a revision, are now.
--
-- KEYS: meta, log, the rows of each table
-- ARGV: the revision and its nonce; the names of the tables
-- It returns up to which revision, its nonce, and the newest revision; then table, key and
-- value of each row, no value for one that is gone. '' says that nobody remembers.
local from, nonce = ARGV[1], ARGV[2]
local is = redis.call('HMGET', KEYS[1], 'rev', 'nonce')
local rev = is[1] or '0'
if rev == from then
  if (is[2] or '') == nonce then
    return {from, nonce, rev}
  end
  return {''} -- the same number of another history
end
local entries = redis.call('XRANGE', KEYS[2], from .. '-0', '+', 'COUNT', 33)
local first = 1
if from == '0' then
  if not entries[1] or entries[1][1] ~= '1-0' then
    return {''}
  end
else
  if not entries[1] or entries[1][1] ~= from .. '-0' or entries[1][2][2] ~= nonce then
    return {''}
  end
  first = 2
end
local at = {}
for i = 3, #ARGV do
  at[ARGV[i]] = KEYS[i]
end
local out, seen, n = {from, nonce, rev}, {}, 0
for i = first, #entries do
  local changed = cmsgpack.unpack(entries[i][2][4])
  for j = 1, #changed, 2 do
    local t, k = changed[j], changed[j + 1]
    seen[t] = seen[t] or {}
    if at[t] and not seen[t][k] then
      seen[t][k] = true
      out[#out + 1] = t
      out[#out + 1] = k
      out[#out + 1] = redis.call('HGET', at[t], k)
      n = n + 1
    end
  end
  out[1] = string.match(entries[i][1], '^%d+')
  out[2] = entries[i][2][2]
  if n > 2000 then
    break
  end
end
return out
