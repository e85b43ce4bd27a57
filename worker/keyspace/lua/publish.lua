-- publish: after the COMMIT, balances appear, their ids leave pending and stream entries are deleted, together.
-- KEYS 1 stream, 2 counter of the minute, then per account: balance, lease, one pending per group
-- ARGV 1 n stream entries, their ids; then n accounts; per account: balance ('' = none), end of its life (ms), n groups;
--      per group: n ids, their ids
-- A balance replaces an older one. If none is cached, the script only removes ids and ends a loader's lease. An account
-- without a balance, or with an expired one, must be loaded again.
-- Returns the number of deleted stream entries.
local now = tonumber(now_ms())
local at = 2
local deleted = 0
local n = tonumber(ARGV[1])
for first = at, at + n - 1, 1000 do
  deleted = deleted + redis.call('XDEL', KEYS[1], unpack(ARGV, first, math.min(first + 999, at + n - 1)))
end
at = at + n

local accounts = tonumber(ARGV[at])
at = at + 1
local key = 3
for _ = 1, accounts do
  local balance, left, groups = ARGV[at], tonumber(ARGV[at + 1]) - now, tonumber(ARGV[at + 2])
  at = at + 3
  redis.call('DEL', KEYS[key + 1])
  if balance == '' then
    redis.call('DEL', KEYS[key])
  else
    local cached = redis.call('GET', KEYS[key])
    if cached and is_newer(balance, cached) then
      if left > 0 then redis.call('SET', KEYS[key], balance, 'PX', integer(left)) else redis.call('DEL', KEYS[key]) end
    elseif cached and epoch_of(cached) ~= epoch_of(balance) then
      redis.call('DEL', KEYS[key]) -- another epoch: it may or may not hold this debit
    end
  end
  key = key + 2
  for _ = 1, groups do
    at = drop_listed(KEYS[key], at)
    key = key + 1
  end
end

if deleted > 0 then
  redis.call('INCRBY', KEYS[2], deleted)
  redis.call('PEXPIRE', KEYS[2], 600000)
end
return deleted
