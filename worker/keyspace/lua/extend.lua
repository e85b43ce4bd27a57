-- extend: an open hold ends at another time, or counts for another amount, by the gate of reserve. One that is over stays
-- over: nothing revives it.
-- KEYS 1 balance, 2 pending, 3 holds, 4 hold, 5 expiries, then per sub-meter: pending, holds; totals
-- ARGV 1 meter, 2 amount or '' (as it is), 3 hold key, 4 ttl ms from now or '' (as it is), 5 outcome ttl ms,
--      6 `user:meter`, 7 '1' to hold whatever the balance, then per sub-meter: its name, `user:sub-meter`
-- Returns {'held', amount, left, expires ms, sub-meter or '', multiplier or ''}, {'closed', state}, {'missing'} where
-- nothing is known of it, {'conflict', meter, amount, sub-meter or ''} where it is on another meter, or on a sub-meter that
-- is not among these, {'refused', more, sub-meter or '', the answer of the gate that denied so many more…}, or {'load'}.
totals = table.remove(KEYS)
local now = now_ms()
local record = read_hold(KEYS[4])
local state = hold_state(record, now)
if state == 'unknown' then return {'missing'} end
if state ~= 'held' then return {'closed', state} end

local sub, member
for i = 8, #ARGV, 2 do
  if ARGV[i] == record.sub_meter then sub, member = i - 2, ARGV[i + 1] end
end
if record.meter ~= ARGV[1] or record.sub_meter and not sub then
  return {'conflict', record.meter, record.amount, record.sub_meter or ''}
end

local id = 'h:' .. ARGV[3]
local left = redis.call('HGET', KEYS[2], id)
-- An event that names the hold was applied: its id left with the publish, and `close` is on its way.
if not left then return {'closed', 'settled'} end

-- What was captured of the hold. While some of it is left, no capture was cut short; else the parts say how much it was.
local function captured()
  if left ~= '0' then return tonumber(record.amount) - tonumber(left) end
  local parts, sum = {}, 0
  for _, field in ipairs(redis.call('HKEYS', KEYS[4])) do
    if string.sub(field, 1, 9) == 'captured:' then parts[#parts + 1] = field end
  end
  for first = 1, #parts, 1000 do
    local last = math.min(first + 999, #parts)
    for _, amount in ipairs(redis.call('HMGET', KEYS[4], unpack(parts, first, last))) do sum = sum + tonumber(amount) end
  end
  return sum
end

local amount = record.amount
if ARGV[2] ~= '' and ARGV[2] ~= amount then
  amount = ARGV[2]
  local remains = math.max(0, tonumber(amount) - captured())
  local more = integer(remains - tonumber(left))
  if remains > tonumber(left) and ARGV[7] ~= '1' then
    local allowance = redis.call('HGET', KEYS[4], 'allowance') == '1'
    local status, reply = judge(now, ARGV[1], more, sub and {{record.sub_meter, sub}} or {}, allowance)
    if status == 'load' then return reply end
    if status ~= 'allowed' then return {'refused', more, record.sub_meter or '', unpack(reply)} end
  end
  for _, pending in ipairs({KEYS[2], sub and KEYS[sub]}) do
    redis.call('HINCRBY', pending, id, more)
    redis.call('HINCRBY', pending, 'total', more)
  end
  redis.call('HSET', KEYS[4], 'amount', amount)
  left = integer(remains)
end

local expires = record.expires_ms
if ARGV[4] ~= '' then
  expires = integer(tonumber(now) + tonumber(ARGV[4]))
  redis.call('HSET', KEYS[4], 'expires_ms', expires)
  redis.call('PEXPIRE', KEYS[4], integer(tonumber(ARGV[4]) + tonumber(ARGV[5])))
  redis.call('ZADD', KEYS[3], expires, ARGV[3])
  redis.call('ZADD', KEYS[5], 'LT', expires, ARGV[6])
  if sub then
    redis.call('ZADD', KEYS[sub + 1], expires, ARGV[3])
    redis.call('ZADD', KEYS[5], 'LT', expires, member)
  end
end
return {'held', amount, left, expires, record.sub_meter or '', record.multiplier or ''}
