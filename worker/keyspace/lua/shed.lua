-- shed: ids leave pending that the balance which a load is about to install contains: those beyond what one step may take.
-- The cached balance goes first, as it may not contain them: nobody is answered until that load, or a later one, installs
-- its own. The lease gets another token, so that a load which read the ledger earlier installs nothing, and more time.
-- KEYS 1 balance, 2 lease, 3 pending; totals
-- ARGV 1 token, 2 fresh token, 3 ttl of the lease (ms), 4 n, n ids
-- Returns the token in force from now on; nil if the lease is gone: then nothing happened.
totals = table.remove(KEYS)
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return nil end
redis.call('DEL', KEYS[1])
-- The life of the balance begins with the lease, as before.
local token = ARGV[2] .. ':' .. (string.match(ARGV[1], ':(%d+)$') or now_ms())
redis.call('SET', KEYS[2], token, 'PX', ARGV[3])
drop_listed(KEYS[3], 4)
write_totals()
return token
