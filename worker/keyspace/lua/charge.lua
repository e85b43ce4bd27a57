-- charge: check, count as pending and append, in one step. A repeat gets the first answer, or while the event still waits
-- that it is one; a denial leaves no trace.
-- KEYS 1 balance, 2 pending, 3 holds, 4 charge, 5 stream, 6 rung; of the sub-meter it counts against: 7 pending, 8 holds;
--      totals
-- ARGV 1 meter, 2 units that it may cost at most, 3 event id, 4 event, 5 stamps (see `append`), 6 ring ttl ms,
--      7 outcome ttl ms, 8 amount; 9 sub-meter, if any; '-purchased' at the end, if purchased units do not count
-- Returns {'charged', limit, used, rollover, purchased, spill, pending before, repeated, rung, facts of the wallet if the
-- meter has one}, {'conflict', meter, amount}, the answer of the gate that denied, or {'load'}.
totals = table.remove(KEYS)
local allowance = leaves_purchased()
local record = redis.call('HMGET', KEYS[4], 'meter', 'amount', 'reply')
if record[1] then
  if record[1] ~= ARGV[1] or record[2] ~= ARGV[8] then return {'conflict', record[1], record[2]} end
  local reply = cjson.decode(record[3])
  reply[8], reply[9], reply[10] = 1, 0, reply[8]
  return reply
end

local status, reply = gate(now_ms(), 7, 9, allowance)
local facts = type(reply[#reply]) == 'table' and reply[#reply] or nil
if status ~= 'allowed' then
  -- Denied, perhaps by the very event: it may wait to be applied for longer than its outcome is remembered.
  local waiting = status ~= 'load' and redis.call('HGET', KEYS[2], 'e:' .. ARGV[3])
  if not waiting then return reply end
  if waiting ~= ARGV[2] then return {'conflict', ARGV[1], waiting} end
  local repeated, cost = {'charged', unpack(reply, 2, 6)}, tonumber(waiting)
  if facts then
    local whole, part, carried, pending = unpack(facts, 2, 5)
    local before = tonumber(pending) - cost
    facts[5] = integer(before)
    cost = cost * whole + cost_of_part(tonumber(pending), part, carried) - cost_of_part(before, part, carried)
  end
  repeated[7], repeated[8], repeated[9], repeated[10] = integer(tonumber(reply[7]) - cost), 1, 0, facts
  return repeated
end

local charged = {'charged', unpack(reply, 2, 7)}
charged[8] = facts
append(KEYS[5], ARGV[4], ARGV[5])
add_event(KEYS[2], ARGV[3], ARGV[2])
if ARGV[9] then add_id(KEYS[7], 'e:' .. ARGV[3], ARGV[2]) end
write_totals()
redis.call('HSET', KEYS[4], 'meter', ARGV[1], 'amount', ARGV[8], 'reply', cjson.encode(charged))
redis.call('PEXPIRE', KEYS[4], ARGV[7])
charged[8], charged[9], charged[10] = 0, ring(KEYS[6], ARGV[6]), facts
return charged
