-- lease: the right to install a balance read from Postgres. Loaders at the same time share it; a publish ends it for all.
-- The token ends with the time (ms) at which the lease began: reads under it are not older.
-- KEYS 1 lease, then the balance, if a fresh one makes the load needless
-- ARGV 1 fresh token, 2 ttl ms
-- Returns the token in force; '' if the balance is there: somebody has loaded it since the caller asked.
local text = KEYS[2] and redis.call('GET', KEYS[2])
if text and not is_stale(text, now_ms()) then return '' end
local token = redis.call('GET', KEYS[1])
if token then return token end
token = ARGV[1] .. ':' .. now_ms()
redis.call('SET', KEYS[1], token, 'PX', ARGV[2])
return token
