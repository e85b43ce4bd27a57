-- install: cache a balance read from Postgres, if the lease stands and no newer balance is cached.
-- Events that this balance already contains leave pending in the same step, so that none counts twice.
-- Its life begins with the lease, not now: even after a slow load no balance outlives its period.
-- KEYS 1 balance, 2 lease, 3… pending
-- ARGV 1 token, 2 balance, 3 ttl ms, 4 shortest life from now (ms), then per pending key: n, n ids
-- Returns 1 if it installed the balance, else 0; 'late' if the balance's life was over before it came.
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
if not is_newer(ARGV[2], redis.call('GET', KEYS[1])) then return 0 end
local now = now_ms()
local taken = string.match(ARGV[1], ':(%d+)$') or now -- a lease of an older release has no time
local left = math.max(tonumber(taken) + tonumber(ARGV[3]) - tonumber(now), tonumber(ARGV[4]))
if left <= 0 then return 'late' end
redis.call('SET', KEYS[1], ARGV[2], 'PX', integer(left))
local at = 5
for i = 3, #KEYS do at = drop_listed(KEYS[i], at) end
return 1
