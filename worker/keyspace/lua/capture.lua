-- capture: a part of a hold becomes an event; the rest stays held. The event counts in full, even if more than was left.
-- KEYS 1 pending, 2 hold, 3 stream, 4 rung, then per sub-meter: pending; totals
-- ARGV 1 hold key, 2 event id, 3 amount, 4 event, 5 stamps (see `append`), 6 ring ttl ms, 7 outcome ttl ms,
--      8 units that it may cost at most, 9 index in KEYS of the pending of the event's sub-meter, if any
-- Returns {state, amount captured, repeated, rung}; {'conflict', amount} if the event id has another amount.
totals = table.remove(KEYS)

local function take(pending)
  local held = redis.call('HGET', pending, 'h:' .. ARGV[1])
  if not held then return end
  local part = integer(0 - math.min(tonumber(held), tonumber(ARGV[8])))
  redis.call('HINCRBY', pending, 'h:' .. ARGV[1], part)
  redis.call('HINCRBY', pending, 'total', part)
end

local now = now_ms()
local record = read_hold(KEYS[2])
local before = redis.call('HGET', KEYS[2], 'captured:' .. ARGV[2])
local state = hold_state(record, now)
if before then
  if before ~= ARGV[3] then return {'conflict', before} end
  return {state, before, 1, 0}
end

append(KEYS[3], ARGV[4], ARGV[5])
add_event(KEYS[1], ARGV[2], ARGV[8])
if ARGV[9] then add_id(KEYS[tonumber(ARGV[9])], 'e:' .. ARGV[2], ARGV[8]) end
write_totals()
redis.call('HSET', KEYS[2], 'captured:' .. ARGV[2], ARGV[3])
if not record.state then redis.call('PEXPIRE', KEYS[2], ARGV[7]) end
if state == 'held' then
  take(KEYS[1])
  for i = 5, #KEYS do take(KEYS[i]) end
end
return {state, ARGV[3], 0, ring(KEYS[4], ARGV[6])}
