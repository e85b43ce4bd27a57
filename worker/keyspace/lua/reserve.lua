-- reserve: check, and hold the amount under a key.
-- KEYS 1 balance, 2 pending, 3 holds, 4 hold, 5 expiries; of the sub-meter it counts against, if any: 6 pending, 7 holds;
--      totals
-- ARGV 1 meter, 2 amount, 3 hold key, 4 ttl ms, 5 outcome ttl ms, 6 `user:meter`, 7 '1' to hold without a check,
--      8 multiplier or '' where the amount came without one, 9 the call that reserves, or '' if it is nobody's;
--      10 `user:sub-meter`, 11 sub-meter; '-purchased' at the end, if purchased units do not count
-- Returns {'held', amount, left, expires ms, multiplier} (also for a repeat), {'conflict', meter, amount, sub-meter or '',
-- multiplier}, {'closed', state}, the answer of the gate that denied, or {'load'}. The multiplier is missing if the hold
-- has none, as the holds of older releases.
totals = table.remove(KEYS)
local allowance = leaves_purchased()
local now = now_ms()
local record = read_hold(KEYS[4])
if record.state then
  local state = hold_state(record, now)
  if state ~= 'held' then return {'closed', state} end
  local other = ARGV[8] ~= '' and record.multiplier and record.multiplier ~= ARGV[8]
  if other or record.meter ~= ARGV[1] or record.amount ~= ARGV[2] or record.sub_meter ~= (ARGV[11] or false) then
    return {'conflict', record.meter, record.amount, record.sub_meter or '', record.multiplier or nil}
  end
  -- The caller that reserved again works under it: an earlier release that arrives later does not mean this hold. But a
  -- call that is sent again, because its connection was lost, is the one that has it.
  if ARGV[9] ~= '' and redis.call('HGET', KEYS[4], 'call') ~= ARGV[9] then
    redis.call('HSET', KEYS[4], 'again', '1')
  end
  local left = redis.call('HGET', KEYS[2], 'h:' .. ARGV[3]) or '0'
  return {'held', record.amount, left, record.expires_ms, record.multiplier or nil}
end

if ARGV[7] ~= '1' then
  local status, reply = gate(now, 6, 11, allowance)
  if status ~= 'allowed' then return reply end
end

-- Its end first: whatever Redis refuses after it, no id stays in pending for ever.
local expires = integer(tonumber(now) + tonumber(ARGV[4]))
redis.call('ZADD', KEYS[5], 'LT', expires, ARGV[6])
redis.call('ZADD', KEYS[3], expires, ARGV[3])
if ARGV[11] then
  redis.call('ZADD', KEYS[5], 'LT', expires, ARGV[10])
  redis.call('ZADD', KEYS[7], expires, ARGV[3])
  add_id(KEYS[6], 'h:' .. ARGV[3], ARGV[2])
end
if add_id(KEYS[2], 'h:' .. ARGV[3], ARGV[2]) then holds_added = 1 end
write_totals()
local fields = {'state', 'held', 'meter', ARGV[1], 'amount', ARGV[2], 'expires_ms', expires, 'call', ARGV[9]}
if ARGV[8] ~= '' then fields[11], fields[12] = 'multiplier', ARGV[8] end
if ARGV[11] then fields[#fields + 1], fields[#fields + 2] = 'sub_meter', ARGV[11] end
if allowance then fields[#fields + 1], fields[#fields + 2] = 'allowance', '1' end -- for `extend`
redis.call('HSET', KEYS[4], unpack(fields))
redis.call('PEXPIRE', KEYS[4], integer(tonumber(ARGV[4]) + tonumber(ARGV[5])))
return {'held', ARGV[2], ARGV[2], expires, ARGV[8] ~= '' and ARGV[8] or nil}
