#!lua
-- Makes a handle the writer, and tries every command that a commit may need, so that an
-- ACL that forbids one is known now and not in the middle of a batch.
--
-- KEYS: meta, lead, and a hash, a sorted set and a stream to try
-- ARGV: the lease that must be held, '' for any; what names this claim
local lease, token = ARGV[1], ARGV[2]
if lease ~= '' and redis.call('GET', KEYS[2]) ~= lease then
  return {'0'}
end
redis.call('HSET', KEYS[3], 'a', 'b')
redis.call('HMGET', KEYS[3], 'a')
redis.call('HDEL', KEYS[3], 'a')
redis.call('ZADD', KEYS[4], 0, 'a')
redis.call('ZRANGE', KEYS[4], '-', '+', 'BYLEX', 'LIMIT', 0, 1)
redis.call('ZREM', KEYS[4], 'a')
redis.call('XADD', KEYS[5], 'MAXLEN', '~', 1, '*', 'a', 'b')
redis.call('XRANGE', KEYS[5], '-', '+')
redis.call('DEL', KEYS[5])
local schema = redis.call('HGET', KEYS[1], 'schema')
if schema and schema ~= '1' then
  return {'2', schema}
end
if redis.call('HGET', KEYS[1], 'writer') ~= token then
  redis.call('HINCRBY', KEYS[1], 'epoch', 1)
  redis.call('HSET', KEYS[1], 'schema', '1', 'writer', token, 'turn', '0')
  redis.call('HSETNX', KEYS[1], 'rev', '0')
end
return {'1', redis.call('HGET', KEYS[1], 'epoch')}
