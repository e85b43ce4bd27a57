-- sponsor_settle: the cost of the request is known; the pool pays its part of the hold, the rest is free again.
-- Counts in the window that held it. If the hold has expired (late), the script takes the units that are still allowed.
-- KEYS 1 pool, 2 promised, 3 holds, 4 standing, 5 today, 6 holds of the user, 7 hold, 8 stream, 9 rung; totals
-- ARGV 1 user, 2 request, 3 actual, 4 paid, or '' for the hold's, 5 ring ttl ms, 6 outcome ttl ms, 7 day ms,
--      8 the host's tier, '' for the account's own, '?' if the host was not asked yet,
--      9 trace, 10… tier, daily budget, the lowest first
-- A repeat gets the first answer. Without a hold to settle nothing changes.
-- Returns {'settled', held, actual, paid, absorbed, late, repeated, rung}, {'conflict', user, held}, {'closed', state}
-- with state unknown or released; and for a late one, {'tier'}, {'load'} for the standing or {'load_pool'}.
totals = table.remove(KEYS)
local user, id = ARGV[1], ARGV[2]
local now = now_ms()
local request = read_request(KEYS[7])
local state = hold_state(request, now)

local function answer(repeated, rung)
  return {
    'settled', request.held, request.actual, request.paid, request.absorbed, tonumber(request.late), repeated, rung}
end

if state == 'unknown' or state == 'released' then return {'closed', state} end
if request.user ~= user then return {'conflict', request.user, request.held} end
if state == 'settled' then return answer(1, 0) end

request.actual = ARGV[3]
if ARGV[4] ~= '' then request.paid = ARGV[4] end
local absorbed = math.min(tonumber(request.held), math.max(0, tonumber(request.actual) - tonumber(request.paid)))
local found
if state == 'held' then
  request.late = '0'
else
  if ARGV[8] == '?' then return {'tier'} end
  local missing
  found, missing = find(now, ARGV[7], ARGV[8], 10)
  if not found then return missing end
  request.late = '1'
  request.tier, request.budget = found.tier, found.budget
  absorbed = math.min(absorbed, found.room)
  if absorbed > 0 then request.window = found.window or now end
end
request.absorbed = integer(absorbed)

tell(
  KEYS[8], ARGV[9], 'k', 'grant', 'user', user, 'request', id, 'held', request.held, 'actual', request.actual,
  'paid', request.paid, 'absorbed', request.absorbed, 'window', request.window, 'tier', request.tier,
  'budget', request.budget, 'late', request.late)
if absorbed > 0 and add_id(KEYS[2], 'g:' .. id, request.absorbed) then events_added = 1 end
redis.call(
  'HSET', KEYS[7], 'state', 'settled', 'actual', request.actual, 'paid', request.paid, 'absorbed', request.absorbed,
  'late', request.late)
redis.call('PEXPIRE', KEYS[7], ARGV[6])
if state == 'held' then
  drop_ids(KEYS[2], {'h:' .. id}, 1, 1)
  if drop_ids(KEYS[5], {'h:' .. id}, 1, 1) > 0 then count_absorbed(request.absorbed) end
  redis.call('ZREM', KEYS[3], id)
  redis.call('ZREM', KEYS[6], id)
elseif absorbed > 0 then
  open_window(found, ARGV[7], request.window)
  count_absorbed(request.absorbed)
end
write_totals()
return answer(0, ring(KEYS[9], ARGV[5]))
