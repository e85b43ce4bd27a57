-- recount: correct the numbers of pending ids by what a scan has found, and note which ids are stuck.
-- KEYS 1 totals
-- ARGV 1 events too few, 2 holds too few (below 0: too many), 3 ids whose stream entries are lost
local function correct(kind, number)
  local field = tonumber(number) < 0 and '_left' or '_added'
  if number ~= '0' then redis.call('HINCRBY', KEYS[1], kind .. field, integer(math.abs(tonumber(number)))) end
end

correct('events', ARGV[1])
correct('holds', ARGV[2])
local now = now_ms()
redis.call('HSET', KEYS[1], 'counted_at_ms', now, 'stuck', ARGV[3], 'stuck_at_ms', now)
return 1
