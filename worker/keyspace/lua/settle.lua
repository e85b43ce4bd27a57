-- settle: the hold becomes one event, and the rest of the hold is free again. Always records: the work was done.
-- The event id tells a repeat; another event for the same hold is another fact.
-- KEYS 1 pending, 2 holds, 3 hold, 4 stream, 5 rung, then per sub-meter: pending, holds; totals
-- ARGV 1 hold key, 2 event id, 3 amount, 4 event, 5 stamps (see `append`), 6 ring ttl ms, 7 outcome ttl ms,
--      8 units that it may cost at most, 9 index in KEYS of the pending of the event's sub-meter, if any
-- Returns {state before, event id, amount, repeated, rung, meter of the hold or ''}.
totals = table.remove(KEYS)
local now = now_ms()
local record = read_hold(KEYS[3])
if record.state == 'settled' and record.event_id == ARGV[2] then
  return {record.before, record.event_id, record.settled, 1, 0, record.meter or ''}
end

local before = hold_state(record, now)
append(KEYS[4], ARGV[4], ARGV[5])
add_event(KEYS[1], ARGV[2], ARGV[8])
if ARGV[9] then add_id(KEYS[tonumber(ARGV[9])], 'e:' .. ARGV[2], ARGV[8]) end
drop_ids(KEYS[1], {'h:' .. ARGV[1]}, 1, 1)
redis.call('ZREM', KEYS[2], ARGV[1])
drop_hold(ARGV[1], 6)
write_totals()
redis.call('HSET', KEYS[3], 'state', 'settled', 'before', before, 'event_id', ARGV[2], 'settled', ARGV[3])
redis.call('PEXPIRE', KEYS[3], ARGV[7])
return {before, ARGV[2], ARGV[3], 0, ring(KEYS[5], ARGV[6]), record.meter or ''}
