#!lua
-- Takes the lease, or says who has it, for how long, and which is the last change.
--
-- KEYS: lead, the changes
-- ARGV: the lease, '' to look only; ms
local is = redis.call('GET', KEYS[1])
if not is and ARGV[1] ~= '' then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', 16, '*', 'lead', ARGV[1])
  return {'1'}
end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
return {'0', is or '', tostring(redis.call('PTTL', KEYS[1])), last[1] and last[1][1] or '0-0'}
