-- install: cache a balance read from Postgres, if the lease stands and no newer balance is fresh.
-- Events that this balance already contains leave pending in the same step, so that none counts twice.
-- Its life begins with the lease, not now: even after a slow load no balance outlives its period.
-- A balance older than the newest that was published is not what the ledger says: it comes from a standby or a copy.
-- KEYS 1 balance, 2 lease, 3… pending, then the version if versions of this balance are remembered; totals
-- ARGV 1 token, 2 balance, 3 ttl ms, 4 shortest life from now (ms), 5 ms that it is kept; longer than the ttl: once stale,
--      then per pending key: n, n ids
-- Returns 1 if it installed the balance, else 0; 'late' if the balance's life was over before it came; 'old'.
totals = table.remove(KEYS)
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
local now = now_ms()
local cached = redis.call('GET', KEYS[1])
-- A stale one counts as none: the lease stands, so that whatever Postgres says now is no older than what it said then.
if cached and not is_stale(cached, now) and not is_newer(ARGV[2], cached) then return 0 end
-- The lists of ids tell which key is the last pending one.
local pending, at = 2, 6
while at <= #ARGV do pending, at = pending + 1, at + 1 + tonumber(ARGV[at]) end
local version = KEYS[pending + 1]
-- No account: that allows nothing, and there may be none any more.
if version and not lacks_account(ARGV[2]) and not is_newer(ARGV[2], redis.call('GET', version)) then return 'old' end
local taken = string.match(ARGV[1], ':(%d+)$') or now -- a lease of an older release has no time
local age = tonumber(now) - tonumber(taken)
local left = math.max(tonumber(ARGV[3]) - age, tonumber(ARGV[4]))
if left <= 0 then return 'late' end
local text, kept = ARGV[2], tonumber(ARGV[5]) - age
if kept > left then
  text = fresh_until(text, tonumber(now) + left)
  left = kept
end
redis.call('SET', KEYS[1], text, 'PX', integer(left))
at = 6
for i = 3, pending do at = drop_listed(KEYS[i], at) end
write_totals()
return 1
