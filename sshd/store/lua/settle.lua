#!lua
-- Finds out what became of a commit whose answer did not come. If it was not applied it
-- never will be, wherever it may still be under way: it is of a turn that is over. A turn
-- only grows, so that a settling that arrives late does no harm. It always writes, for
-- WAITAOF to have something to wait for.
--
-- KEYS: meta, log
-- ARGV: epoch, the next turn, the commit's revision, its nonce
local is = redis.call('HMGET', KEYS[1], 'epoch', 'turn')
local mine = is[1] == ARGV[1]
if mine and tonumber(is[2]) < tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], 'turn', ARGV[2])
end
local e = redis.call('XRANGE', KEYS[2], ARGV[3] .. '-0', ARGV[3] .. '-0')
if e[1] and e[1][2][2] == ARGV[4] then
  return {'1'}
end
return {mine and '0' or '2'}
