-- lease: the right to install a balance read from Postgres. Loaders at the same time share it; a publish ends it for all.
-- The token ends with the time (ms) at which the lease began: reads under it are not older.
-- KEYS 1 lease
-- ARGV 1 fresh token, 2 ttl ms
-- Returns the token in force.
local token = redis.call('GET', KEYS[1])
if token then return token end
token = ARGV[1] .. ':' .. now_ms()
redis.call('SET', KEYS[1], token, 'PX', ARGV[2])
return token
