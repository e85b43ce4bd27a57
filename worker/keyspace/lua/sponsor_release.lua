-- sponsor_release: give the hold back to the pool and the user's window, and keep its id closed, so that a late decision
-- cannot revive it. An expired or settled hold stays so.
-- KEYS 1 hold, 2 promised, 3 holds, 4 today, 5 holds of the user; totals
-- ARGV 1 user, 2 request, 3 reason, 4 outcome ttl ms, 5 the call that decided, of which it is the end, or none: what
--      another call holds, or was told of, stays
-- Returns {state before, held at first}, or {'conflict', user, held}.
totals = table.remove(KEYS)
local now = now_ms()
local request = read_request(KEYS[1])
local before = hold_state(request, now)
local held = request.held or '0'
if request.user and request.user ~= ARGV[1] then return {'conflict', request.user, held} end
if ARGV[5] and request.state and (request.call ~= ARGV[5] or request.again) then return {before, held} end
drop_hold(ARGV[2], 2)
write_totals()
if before == 'held' or before == 'unknown' then
  redis.call('HSET', KEYS[1], 'state', 'released', 'user', ARGV[1], 'reason', ARGV[3])
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
return {before, held}
