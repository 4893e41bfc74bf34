#!lua
-- Reads all doors, and forgets those that have expired.
--
-- KEYS: the set of fingerprints
-- ARGV: what the keys of doors begin with
local out = {}
for _, f in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local door = redis.call('GET', ARGV[1] .. f)
  if door then
    out[#out + 1] = f
    out[#out + 1] = door
  else
    redis.call('SREM', KEYS[1], f)
  end
end
return out
