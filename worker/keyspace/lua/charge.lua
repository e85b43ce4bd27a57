-- charge: check, count as pending and append, in one step. A repeat gets the first answer; a denial leaves no trace.
-- KEYS 1 balance, 2 pending, 3 holds, 4 charge, 5 stream, 6 rung; of the sub-meter it counts against: 7 pending, 8 holds
-- ARGV 1 meter, 2 amount, 3 event id, 4 event, 5 signature or '', 6 ring ttl ms, 7 outcome ttl ms; 8 sub-meter, if any
-- Returns {'charged', limit, used, rollover, purchased, spill, pending before, repeated, rung},
-- {'conflict', meter, amount}, the answer of the gate that denied, or {'load'}.
local record = redis.call('HMGET', KEYS[4], 'meter', 'amount', 'reply')
if record[1] then
  if record[1] ~= ARGV[1] or record[2] ~= ARGV[2] then return {'conflict', record[1], record[2]} end
  local reply = cjson.decode(record[3])
  reply[8], reply[9] = 1, 0
  return reply
end

local status, reply = gate(now_ms(), 7, 8)
if status ~= 'allowed' then return reply end

local charged = {'charged', unpack(reply, 2, 7)}
redis.call('HSET', KEYS[4], 'meter', ARGV[1], 'amount', ARGV[2], 'reply', cjson.encode(charged))
redis.call('PEXPIRE', KEYS[4], ARGV[7])
add_id(KEYS[2], 'e:' .. ARGV[3], ARGV[2])
if ARGV[8] then add_id(KEYS[7], 'e:' .. ARGV[3], ARGV[2]) end
charged[8], charged[9] = 0, append(KEYS[5], KEYS[6], ARGV[6], ARGV[4], ARGV[5])
return charged
