-- release: give the hold back and keep its key closed, so that a late reserve cannot revive it.
-- KEYS 1 pending, 2 holds, 3 hold, then per sub-meter: pending, holds; totals
-- ARGV 1 hold key, 2 outcome ttl ms, 3 '1' for a late one: it leaves alone a hold that was reserved again meanwhile, and
--      an unknown key, 4 the call that reserved, of which it is the end, or none: the hold of another call stays
-- Returns {state before, meter or '', amount first held, amount given back}.
totals = table.remove(KEYS)
local now = now_ms()
local record = read_hold(KEYS[3])
local before = hold_state(record, now)
if ARGV[3] == '1' and (before == 'unknown' or redis.call('HGET', KEYS[3], 'again')) then
  return {before, record.meter or '', record.amount or '0', '0'}
end
-- Nobody has received the answer of that call, which may even come after this; a hold that another call made, or was
-- told of, is in that one's hands.
if ARGV[4] and record.state then
  local made = redis.call('HMGET', KEYS[3], 'call', 'again')
  if made[1] ~= ARGV[4] or made[2] then return {before, record.meter or '', record.amount or '0', '0'} end
end
local freed = drop_ids(KEYS[1], {'h:' .. ARGV[1]}, 1, 1)
redis.call('ZREM', KEYS[2], ARGV[1])
drop_hold(ARGV[1], 4)
write_totals()
if before == 'held' or before == 'unknown' then
  redis.call('HSET', KEYS[3], 'state', 'released')
  redis.call('PEXPIRE', KEYS[3], ARGV[2])
end
return {before, record.meter or '', record.amount or '0', integer(freed)}
