-- reserve: check, and hold the amount under a key.
-- KEYS 1 balance, 2 pending, 3 holds, 4 hold, 5 expiries; of the sub-meter it counts against, if any: 6 pending, 7 holds
-- ARGV 1 meter, 2 amount, 3 hold key, 4 ttl ms, 5 outcome ttl ms, 6 `user:meter`, 7 '1' to hold without a check;
--      8 `user:sub-meter`, 9 sub-meter
-- Returns {'held', amount, left, expires ms} (also for a repeat), {'conflict', meter, amount, sub-meter or ''},
-- {'closed', state}, the answer of the gate that denied, or {'load'}.
local now = now_ms()
local record = read_hold(KEYS[4])
if record.state then
  local state = hold_state(record, now)
  if state ~= 'held' then return {'closed', state} end
  if record.meter ~= ARGV[1] or record.amount ~= ARGV[2] or record.sub_meter ~= (ARGV[9] or false) then
    return {'conflict', record.meter, record.amount, record.sub_meter or ''}
  end
  -- The caller that reserved again works under it: an earlier release that arrives later does not mean this hold.
  redis.call('HSET', KEYS[4], 'again', '1')
  return {'held', record.amount, redis.call('HGET', KEYS[2], 'h:' .. ARGV[3]) or '0', record.expires_ms}
end

if ARGV[7] ~= '1' then
  local status, reply = gate(now, 6, 9)
  if status ~= 'allowed' then return reply end
end

local expires = integer(tonumber(now) + tonumber(ARGV[4]))
add_id(KEYS[2], 'h:' .. ARGV[3], ARGV[2])
redis.call('HSET', KEYS[4], 'state', 'held', 'meter', ARGV[1], 'amount', ARGV[2], 'expires_ms', expires)
redis.call('PEXPIRE', KEYS[4], integer(tonumber(ARGV[4]) + tonumber(ARGV[5])))
redis.call('ZADD', KEYS[3], expires, ARGV[3])
redis.call('ZADD', KEYS[5], 'LT', expires, ARGV[6])
if ARGV[9] then
  add_id(KEYS[6], 'h:' .. ARGV[3], ARGV[2])
  redis.call('HSET', KEYS[4], 'sub_meter', ARGV[9])
  redis.call('ZADD', KEYS[7], expires, ARGV[3])
  redis.call('ZADD', KEYS[5], 'LT', expires, ARGV[8])
end
return {'held', ARGV[2], ARGV[2], expires}
