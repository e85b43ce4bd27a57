-- emit: count events as pending and append them, all of one partition.
-- KEYS 1 stream, 2 rung, 3… pending, one per event and one more for its sub-meter if it counts against one
-- ARGV 1 ring ttl ms, then per pending: event id, amount, event, signature or ''; without an event it only counts here,
--      and another pending appends it
-- Returns 1 if the bell must ring.
for i = 3, #KEYS do
  local at = 2 + (i - 3) * 4
  add_id(KEYS[i], 'e:' .. ARGV[at], ARGV[at + 1])
  if ARGV[at + 2] ~= '' then write(KEYS[1], ARGV[at + 2], ARGV[at + 3]) end
end
return redis.call('SET', KEYS[2], '1', 'NX', 'PX', ARGV[1]) and 1 or 0
