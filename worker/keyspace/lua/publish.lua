-- publish: after the COMMIT, balances appear, their ids leave pending and stream entries are deleted, together.
-- KEYS 1 stream, 2 counter of the slot of time, then per account: balance, lease, one pending per group; at the end the
--      versions to remember, one per balance in the same order, the hand if this is to be noted, and the totals
-- ARGV 1 n stream entries, their ids; then n accounts; per account: balance ('' = none), end of its life (ms), n groups;
--      per group: n ids, their ids; then for how many ms versions are remembered, if they are; then, if this is to be
--      noted for trim.lua, the token of the drain and the name of the note
-- A balance replaces an older one. If none is cached, the script only removes ids and ends a loader's lease. An account
-- without a balance, or with an expired one, must be loaded again.
-- Returns the number of deleted stream entries.
totals = table.remove(KEYS)

-- Runs a command over many keys, in as many pieces as Lua can unpack; returns all replies of a command that has a list.
local function in_parts(command, names)
  local replies = {}
  for first = 1, #names, 1000 do
    local reply = redis.call(command, unpack(names, first, math.min(first + 999, #names)))
    if type(reply) == 'table' then
      for _, each in ipairs(reply) do replies[#replies + 1] = each end
    end
  end
  return replies
end

local now = tonumber(now_ms())
local at = 2
local n = tonumber(ARGV[1])
at = at + n

local accounts = tonumber(ARGV[at])
at = at + 1
-- Single commands would be most of the cost: so first the keys of all accounts, then what is cached in one read.
local balance_keys, lease_keys = {}, {}
local key, position = 3, at
for i = 1, accounts do
  balance_keys[i], lease_keys[i] = KEYS[key], KEYS[key + 1]
  local groups = tonumber(ARGV[position + 2])
  key, position = key + 2 + groups, position + 3
  for _ = 1, groups do position = position + 1 + tonumber(ARGV[position]) end
end
local cached_balances = in_parts('MGET', balance_keys)
local gone = lease_keys -- keys to delete at the end

key = 3
local balances = {}
for i = 1, accounts do
  local balance, left, groups = ARGV[at], tonumber(ARGV[at + 1]) - now, tonumber(ARGV[at + 2])
  local cached = cached_balances[i]
  at = at + 3
  if balance == '' then
    gone[#gone + 1] = balance_keys[i]
  else
    balances[#balances + 1] = balance
    if cached and is_newer(balance, cached) then
      if left > 0 then
        redis.call('SET', balance_keys[i], balance, 'PX', integer(left))
      else
        gone[#gone + 1] = balance_keys[i]
      end
    elseif cached and epoch_of(cached) ~= epoch_of(balance) then
      gone[#gone + 1] = balance_keys[i] -- another epoch: it may or may not hold this debit
    end
  end
  key = key + 2
  for _ = 1, groups do
    at = drop_listed(KEYS[key], at, gone)
    key = key + 1
  end
end
in_parts('DEL', gone)

-- What is cached expires soon; its version is remembered for longer, so that nothing older is cached then.
local remembered_ms = ARGV[at]
if remembered_ms then
  local version_keys = {}
  for i = 1, #balances do version_keys[i] = KEYS[key + i - 1] end
  local remembered = in_parts('MGET', version_keys)
  for i, balance in ipairs(balances) do
    if is_newer(balance, remembered[i]) then
      redis.call('SET', version_keys[i], string.match(balance, '^%d+ %d+'), 'PX', remembered_ms)
    end
  end
end

-- The entries go last: if a key above is broken, and this script ends with an error, they are there for the next drain.
local deleted = 0
for first = 2, n + 1, 1000 do
  deleted = deleted + redis.call('XDEL', KEYS[1], unpack(ARGV, first, math.min(first + 999, n + 1)))
end
count_disposed(deleted, KEYS[2])
write_totals()
if ARGV[at + 1] and redis.call('HGET', KEYS[#KEYS], 'token') == ARGV[at + 1] then
  redis.call('HSET', KEYS[#KEYS], ARGV[at + 2], '1')
end
return deleted
