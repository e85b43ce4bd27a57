-- sponsor_decide: how much of a request may the pool cover now? Holds that, depending on the mode.
-- KEYS 1 pool, 2 promised, 3 holds, 4 standing, 5 today, 6 holds of the user, 7 hold, 8 expiries; totals
-- ARGV 1 mode, 2 user, 3 request, 4 wanted, 5 estimate, 6 paid, 7 ttl ms, 8 outcome ttl ms, 9 day ms,
--      10 the host's tier or '', 11 member of the expiries for the pool, 12 for the user, 13 the call that asks,
--      14… tier, daily budget, the lowest first
-- Mode: 'advise' holds nothing and needs KEYS 1–6 and the totals only | 'all' holds the wanted units if all fit | 'most' those that fit.
-- A repeat gets the first answer while the hold stands; an answer without a hold leaves no trace. A call that is sent
-- again, because its connection was lost, is no repeat: the hold is its own.
-- Returns {'held' or 'advice', tier, daily budget, taken of the window before, left of the pool before, held,
-- expires ms, repeated}, {'conflict', user, held}, {'closed', state}, {'load'} for the standing or {'load_pool'}.
totals = table.remove(KEYS)
local mode, user, id = ARGV[1], ARGV[2], ARGV[3]
local now = now_ms()
if mode ~= 'advise' and redis.call('HGET', KEYS[7], 'state') then
  local request = read_request(KEYS[7])
  local state = hold_state(request, now)
  if state == 'held' then
    if request.user ~= user or request.mode ~= mode or request.estimate ~= ARGV[5] or request.paid ~= ARGV[6] then
      return {'conflict', request.user, request.held}
    end
    local repeated = request.call ~= ARGV[13]
    -- The caller that asked again works under it: what gives back for the first call, which was interrupted, must not.
    if repeated then redis.call('HSET', KEYS[7], 'again', '1') end
    return {
      'held', request.tier, request.budget, request.taken, request.left, request.held, request.expires_ms,
      repeated and 1 or 0}
  end
  if state ~= 'unknown' then return {'closed', state} end
end

local found, missing = find(now, ARGV[9], ARGV[10], 14)
if not found then return missing end
local wanted, left = tonumber(ARGV[4]), integer(found.left)
local held = math.min(wanted, found.room)
if held == 0 or mode == 'advise' or (mode == 'all' and held < wanted) then
  return {'advice', found.tier, found.budget, found.taken, left, '0', '0', 0}
end

held = integer(held)
local expires = integer(tonumber(now) + tonumber(ARGV[7]))
local window = found.window or now
-- Its end first: whatever Redis refuses after it, no id stays in a map for ever.
redis.call('ZADD', KEYS[8], 'LT', expires, ARGV[11], expires, ARGV[12])
open_window(found, ARGV[9], window)
-- Each write costs more than all reads together, as it goes into the append-only file also. So one write has id and
-- total: the id is in neither map yet, else its hold would be known.
local function hold(map, total, holds)
  redis.call('ZADD', holds, expires, id)
  redis.call('HSET', map, 'h:' .. id, held, 'total', integer(tonumber(total) + tonumber(held)))
end
hold(KEYS[2], found.promised, KEYS[3])
hold(KEYS[5], found.taken, KEYS[6])
holds_added = 1
write_totals()
redis.call(
  'HSET', KEYS[7], 'state', 'held', 'user', user, 'mode', mode, 'estimate', ARGV[5], 'paid', ARGV[6], 'held', held,
  'expires_ms', expires, 'window', window, 'tier', found.tier, 'budget', found.budget, 'taken', found.taken,
  'left', left, 'call', ARGV[13])
redis.call('PEXPIRE', KEYS[7], integer(tonumber(ARGV[7]) + tonumber(ARGV[8])))
return {'held', found.tier, found.budget, found.taken, left, held, expires, 0}
