#!lua
-- KEYS: lead, the changes
-- ARGV: the lease
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('DEL', KEYS[1])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 16, '*', 'lead', '')
return 1
