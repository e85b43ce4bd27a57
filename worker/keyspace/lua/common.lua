-- Shared by all scripts, put before each. Version 8.
-- Every script may be repeated: it adds and removes ids, and counts none, so a lost reply changes nothing.
-- Amounts stay text if possible: Lua counts exactly below 2^53 only and writes large numbers as floats.

-- Milliseconds since the epoch, as text. To write out a number for redis.call costs more than the call itself.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] .. string.sub('00000' .. time[2], -6, -4)
end

local function integer(number)
  return string.format('%.0f', number)
end

-- The key of the stream's totals, for readers that must not scan. It is the last of the KEYS of each script that adds or
-- takes out pending ids; such a script begins with `totals = table.remove(KEYS)` and calls `write_totals` at its end.
local totals
-- Ids that this script has added to the maps that count, and taken out of them.
local events_added, events_left, holds_added, holds_left = 0, 0, 0, 0

local function write_total(field, number)
  redis.call('HINCRBY', totals, field, number == 1 and '1' or integer(number))
end

-- Writes down how many ids came and left: one write for each kind, however many there were. Nothing decides by them.
local function write_totals()
  if events_added > 0 then write_total('events_added', events_added) end
  if events_left > 0 then write_total('events_left', events_left) end
  if holds_added > 0 then write_total('holds_added', holds_added) end
  if holds_left > 0 then write_total('holds_left', holds_left) end
  events_added, events_left, holds_added, holds_left = 0, 0, 0, 0
end

-- Counts stream entries that this script has deleted, of which none is lost: in all, and in a slot of time.
local function count_disposed(deleted, slot)
  if deleted == 0 then return end
  redis.call('HINCRBY', totals, 'disposed', deleted)
  if redis.call('INCRBY', slot, deleted) == deleted then redis.call('PEXPIRE', slot, 120000) end
end

-- True for the maps that count: not for those of sub-meters and of the pool's users, whose ids are in another map also.
local function is_counted(map)
  return not (string.find(map, '/', 1, true) and string.find(map, '/[^:]*$')) and not string.find(map, '}:today:', 1, true)
end

-- Adds an id to a pending map; the total moves only if the id is new.
local function add_id(pending, id, amount)
  if redis.call('HSETNX', pending, id, amount) == 0 then return false end
  redis.call('HINCRBY', pending, 'total', amount)
  return true
end

-- Adds an event to the pending map that counts.
local function add_event(pending, id, amount)
  if add_id(pending, 'e:' .. id, amount) then events_added = events_added + 1 end
end

local H = 104 -- the first byte of the id of a hold

-- Sum of the amounts of list[first..last], and how many of them are there and are holds.
local function sum_of(amounts, list, first)
  local found, holds, sum = 0, 0, 0
  for i, amount in ipairs(amounts) do
    if amount then
      found = found + 1
      sum = sum + tonumber(amount)
      if string.byte(list[first + i - 1]) == H then holds = holds + 1 end
    end
  end
  return found, holds, sum
end

-- The same amounts, each id once, even if listed twice.
local function once(amounts, list, first)
  local seen = {}
  for i, amount in ipairs(amounts) do
    local id = list[first + i - 1]
    if seen[id] then amounts[i] = false end
    seen[id] = true
  end
  return amounts
end

-- Removes the ids list[first..last] from a pending map; the total moves only by those that were there. Deletes an empty
-- map, or adds it to `emptied`, which the caller deletes. Returns the sum of the removed amounts.
local function drop_ids(pending, list, first, last, emptied)
  local amounts = redis.call('HMGET', pending, unpack(list, first, last))
  local found, holds, sum = sum_of(amounts, list, first)
  if found == 0 then return 0 end
  -- One id beside the total: nothing will be left, and the map need not lose the id first.
  local is_last = first == last and redis.call('HLEN', pending) == 2
  if not is_last and redis.call('HDEL', pending, unpack(list, first, last)) ~= found then
    found, holds, sum = sum_of(once(amounts, list, first), list, first)
  end
  if is_counted(pending) then
    holds_left = holds_left + holds
    events_left = events_left + found - holds
  end
  if not is_last and redis.call('HLEN', pending) > 1 then
    redis.call('HINCRBY', pending, 'total', integer(0 - sum))
  elseif emptied then
    emptied[#emptied + 1] = pending
  else
    redis.call('DEL', pending)
  end
  return sum
end

-- The last id of a stream that exists, and the number of stream entries that were ever added to it.
local function stream_facts(stream)
  local info, facts = redis.call('XINFO', 'STREAM', stream), {}
  for i = 1, #info, 2 do facts[info[i]] = info[i + 1] end
  return facts['last-generated-id'], facts['entries-added']
end

-- Takes expired holds out of the pending map, `h:` ids only.
local function expire_holds(pending, holds, now)
  while true do
    local due = redis.call('ZRANGEBYSCORE', holds, '-inf', now, 'LIMIT', '0', '100')
    if #due == 0 then break end
    local ids = {}
    for i, key in ipairs(due) do ids[i] = 'h:' .. key end
    drop_ids(pending, ids, 1, #ids)
    redis.call('ZREM', holds, unpack(due))
  end
  write_totals()
end

-- True if the cached text is due for a load: it stays only for the case that Postgres does not answer. A text without a
-- third number in its head is fresh for as long as it is there.
local function is_stale(text, now)
  local fresh_until = string.match(text, '^%d+ %d+ (%d+)')
  return fresh_until and tonumber(fresh_until) <= tonumber(now)
end

-- The same text, fresh until the moment `ms`.
local function fresh_until(text, ms)
  return (string.gsub(text, '^(%d+ %d+)[ %d]*', '%1 ' .. integer(ms), 1))
end

-- One line of a cached balance, of a meter or of a sub-cap; nil if there is none. Balances cached by an older release
-- have no kind. `bounds` are what else its checks mind, `wallet` is the meter that pays: nil without any.
local function read_line(text, name)
  local limit, used, rollover, purchased, spill, kind, bounds, wallet = string.match(
    text, '\n' .. name .. ' (%S+) (%S+) (%S+) (%S+) (%S+) ?(%S*) ?(%S*) ?(%S*)')
  if not limit then return nil end
  if bounds == '' or bounds == '-' then bounds = nil end
  if wallet == '' then wallet = nil end
  return {limit = limit, used = used, rollover = rollover, purchased = purchased, spill = spill, kind = kind,
    bounds = bounds, wallet = wallet}
end

-- True for the text that stands for a user without an account.
local function lacks_account(text)
  return string.find(text, '\n?', 1, true)
end

-- One meter of a cached balance. `lacks` names the missing part: the account, the meter in its plan, or, if the account
-- is suspended, the right to spend.
local function read_balance(text, meter)
  local balance = read_line(text, meter)
  if balance then return balance end
  local lacks = lacks_account(text) and 'unknown' or 'absent'
  if string.find(text, '\n!', 1, true) then lacks = 'suspended' end
  return {lacks = lacks, limit = '0', used = '0', rollover = '0', purchased = '0', spill = '1', kind = ''}
end

-- True if `amount` more units fit beside `pending`; mirrors worker/rules/waterfall.py, `available`.
local function fits(balance, pending, amount)
  if balance.limit == '-' then return true end
  local room = math.max(0, tonumber(balance.limit) - tonumber(balance.used))
  if balance.spill == '1' then room = room + tonumber(balance.rollover) + tonumber(balance.purchased) end
  return tonumber(amount) <= math.max(0, room - tonumber(pending))
end

-- True if `amount` more units fit beside `pending` into all limits per day, week and month: `bounds` lists each as
-- window:setter:amount:used:end. Mirrors worker/rules/limits.py, `denying`.
local function is_within(bounds, pending, amount)
  for most, used in string.gmatch(bounds, '%a+:%a+:(%d+):(%-?%d+)') do
    if tonumber(amount) > math.max(0, tonumber(most) - tonumber(used) - tonumber(pending)) then return false end
  end
  return true
end

-- Takes the word off the end of ARGV with which a call says that purchased units do not count for it. True if it did.
local function leaves_purchased()
  if ARGV[#ARGV] ~= '-purchased' then return false end
  table.remove(ARGV)
  return true
end

-- Whole units of a wallet that `units` of a meter cost in all, without those of the whole part of its price, which come
-- on top. Exact: each product is below 2^53. Mirrors worker/rules/wallets.py, `cost_of`.
local function cost_of_part(units, part, carried)
  local high = math.floor(units / 1000000)
  return high * part + math.floor(((units - high * 1000000) * part + carried) / 1000000)
end

-- What a request for a meter is in its wallet: the wallet's balance, the units of it that are pending of all its meters,
-- the units that the request costs, and for the answer {wallet, whole part and millionths of the price, millionths
-- carried, units pending of this meter, cap ('-' = none), used of it}; then what is pending in all of the cap.
-- The maps of the other meters lie beside KEYS 2 and 3, under the same tag: only the balance says which meters they are,
-- so no caller can name them.
local function in_wallet(now, text, meter, wallet, amount)
  local maps, lists = string.sub(KEYS[2], 1, -1 - #meter), string.sub(KEYS[3], 1, -1 - #meter)
  local total, cost, own_cost, facts = 0, 0, 0, nil
  local lines = '\n(%S+) %S+ %S+ %S+ %S+ %S+ %S+ %S+ ' .. wallet .. ' (%d+) (%d+) (%d+)'
  for name, whole, part, carried in string.gmatch(text, lines) do
    if name ~= meter then expire_holds(maps .. name, lists .. name, now) end
    local pending = redis.call('HGET', maps .. name, 'total') or '0'
    local units, price, rest = tonumber(pending), tonumber(whole), tonumber(part)
    local of_part = cost_of_part(units, rest, tonumber(carried))
    total = total + units * price + of_part
    if name == meter then
      local more = tonumber(amount)
      cost = more * price + cost_of_part(units + more, rest, tonumber(carried)) - of_part
      own_cost = units * price + of_part
      facts = {wallet, whole, part, carried, pending}
    end
  end
  local cap = read_line(text, wallet .. '/' .. meter)
  facts[6], facts[7] = cap and cap.limit or '-', cap and cap.used or '0'
  return read_balance(text, wallet), integer(total), cost, facts, cap, own_cost
end

-- The gate of check, reserve, extend and charge, which share KEYS 1 balance, 2 pending, 3 holds: the meter first, then
-- the sub-meters. `subs` lists these, each with its name and the index of its pending among the KEYS; its holds are the
-- next. A sub-meter without a line in the balance has no cap there. Returns the status and the answer:
-- {status, limit, used, rollover, purchased, spill, pending, kind}, then per sub-meter: cap ('-' = none), used, pending;
-- then the bounds of the meter, if it has any; at the end a list of facts if the meter has a wallet, see `in_wallet`: the
-- others, the bounds among them, are then the wallet's.
-- `allowance` is true if purchased units do not count: the call says so, or the account, first in its bounds.
-- Status: allowed | denied | limited (by a limit per day, week or month) | capped (the meter has room, a sub-cap has not) |
-- absent (the plan has no such meter) |
-- unknown (there is no account) | suspended (it may spend nothing). Or 'load' and {'load'}, or {'stale'} if an old
-- balance is there: see reuse.lua.
local function judge(now, meter, amount, subs, allowance)
  expire_holds(KEYS[2], KEYS[3], now)
  local text = redis.call('GET', KEYS[1])
  if not text then return 'load', {'load'} end
  if is_stale(text, now) then return 'load', {'stale'} end
  local balance = read_balance(text, meter)
  local pending = redis.call('HGET', KEYS[2], 'total') or '0'
  local status, cost, facts, cap, of_cap = 'allowed', amount, nil, nil, nil
  if balance.wallet then
    balance, pending, cost, facts, cap, of_cap = in_wallet(now, text, meter, balance.wallet, amount)
  end
  local purchased, bounds = balance.purchased, balance.bounds
  if allowance and not (bounds and string.find(bounds, '^allowance')) then
    bounds = bounds and 'allowance,' .. bounds or 'allowance'
  end
  if bounds and string.find(bounds, '^allowance') then balance.purchased = '0' end
  if balance.lacks == 'unknown' or balance.lacks == 'suspended' then
    status = balance.lacks
  elseif not fits(balance, pending, cost) then
    status = balance.lacks or 'denied'
  elseif bounds and not is_within(bounds, pending, cost) then
    status = 'limited'
  elseif cap and not fits(cap, of_cap, cost) then
    status = 'capped'
  end
  local reply = {
    status, balance.limit, balance.used, balance.rollover, purchased, balance.spill, pending, balance.kind}
  for _, sub in ipairs(subs) do
    local name, key = sub[1], sub[2]
    expire_holds(KEYS[key], KEYS[key + 1], now)
    local cap = read_line(text, name)
    local taken = redis.call('HGET', KEYS[key], 'total') or '0'
    local n = #reply
    reply[n + 1], reply[n + 2], reply[n + 3] = cap and cap.limit or '-', cap and cap.used or '0', taken
    if status == 'allowed' and cap and not fits(cap, taken, amount) then status = 'capped' end
  end
  reply[1] = status
  if bounds then reply[#reply + 1] = bounds end
  if facts then reply[#reply + 1] = facts end
  return status, reply
end

-- The gate of scripts that share ARGV 1 meter, 2 amount: the sub-meters are the ARGV from `named` on, their pending and
-- holds the KEYS from `at` on.
local function gate(now, at, named, allowance)
  local subs = {}
  for i = named, #ARGV do subs[i - named + 1] = {ARGV[i], at + 2 * (i - named)} end
  return judge(now, ARGV[1], ARGV[2], subs, allowance)
end

-- Appends an event that our pending map counts to the stream. `stamps` are its signature, its trace and the backend
-- whose sub-cap it counts against, with blanks between them; '' without any.
-- A script appends before its other writes: an XADD that Redis refuses ends the script, and nothing may remember an
-- event that was not appended. If a later write is refused, the event is there, and its repeat is a duplicate.
local function append(stream, event, stamps)
  local signature, trace, backend = string.match(stamps, '^(%S*) ?(%S*) ?(%S*)$')
  local fields = {'v', '1', 'e', event, 'm', backend == '' and '1' or '1/' .. backend}
  if signature ~= '' then fields[7], fields[8] = 's', signature end
  if trace ~= '' then fields[#fields + 1], fields[#fields + 2] = 't', trace end
  redis.call('XADD', stream, '*', unpack(fields))
end

-- Rings once per waiting drain, after all writes. Returns 1 if the bell must ring.
local function ring(rung, ring_ttl_ms)
  return redis.call('SET', rung, '1', 'NX', 'PX', ring_ttl_ms) and 1 or 0
end

-- Takes a hold out of the pending maps and lists of holds in KEYS from `at` on: those of the sub-meters, as it may count
-- against any of them.
local function drop_hold(key, at)
  for i = at, #KEYS, 2 do
    drop_ids(KEYS[i], {'h:' .. key}, 1, 1)
    redis.call('ZREM', KEYS[i + 1], key)
  end
end

-- State of a hold now: an open hold past its time has expired, even if no script has taken it out yet.
local function hold_state(record, now)
  local state = record.state or 'unknown'
  if state == 'held' and tonumber(record.expires_ms) <= tonumber(now) then return 'expired' end
  return state
end

-- The fields of a hold that decide; not its captures, as there may be thousands.
local function read_hold(key)
  local f = redis.call(
    'HMGET', key, 'state', 'meter', 'amount', 'expires_ms', 'before', 'event_id', 'settled', 'sub_meter', 'multiplier')
  return {
    state = f[1], meter = f[2], amount = f[3], expires_ms = f[4], before = f[5], event_id = f[6], settled = f[7],
    sub_meter = f[8], multiplier = f[9]}
end

local function epoch_of(balance)
  return string.match(balance, '^(%d+) ')
end

-- True unless `cached` is newer than `balance`; both begin with "epoch version".
local function is_newer(balance, cached)
  if not cached then return true end
  local epoch, version = string.match(balance, '^(%d+) (%d+)')
  local cached_epoch, cached_version = string.match(cached, '^(%d+) (%d+)')
  epoch, cached_epoch = tonumber(epoch), tonumber(cached_epoch)
  if epoch ~= cached_epoch then return epoch > cached_epoch end
  return tonumber(version) >= tonumber(cached_version)
end

-- Drops the ids listed in ARGV from `at` on (n, then n ids); returns the position after them. `emptied` is as for
-- drop_ids.
local function drop_listed(pending, at, emptied)
  local n = tonumber(ARGV[at])
  for first = at + 1, at + n, 1000 do
    drop_ids(pending, ARGV, first, math.min(first + 999, at + n), emptied)
  end
  return at + n + 1
end
