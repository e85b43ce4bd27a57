-- lease: the right to install a balance read from Postgres. Loaders at the same time share it; a publish ends it for all.
-- KEYS 1 lease
-- ARGV 1 fresh token, 2 ttl ms
-- Returns the token in force.
local token = redis.call('GET', KEYS[1])
if token then return token end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
