-- emit: count events as pending and append them, all of one partition.
-- KEYS 1 stream, 2 rung, 3… pending, one per event
-- ARGV 1 ring ttl ms, then per event: event id, amount, event
-- Returns 1 when the bell must ring.
for i = 3, #KEYS do
  local at = 2 + (i - 3) * 3
  add_id(KEYS[i], 'e:' .. ARGV[at], ARGV[at + 1])
  redis.call('XADD', KEYS[1], '*', 'v', '1', 'e', ARGV[at + 2], 'm', '1')
end
return redis.call('SET', KEYS[2], '1', 'NX', 'PX', ARGV[1]) and 1 or 0
