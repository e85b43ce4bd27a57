-- emit: count events as pending and append them, all of one partition.
-- KEYS 1 stream, 2 rung, 3… pending, one per event and one more for its sub-meter if it counts against one; totals
-- ARGV 1 ring ttl ms, then per pending: event id, units that it may cost at most, event, stamps (see `append`); without an
--      event it only counts here, and another pending appends it
-- Returns 1 if the bell must ring.
totals = table.remove(KEYS)
for i = 3, #KEYS do
  local at = 2 + (i - 3) * 4
  if ARGV[at + 2] ~= '' then
    append(KEYS[1], ARGV[at + 2], ARGV[at + 3])
    add_event(KEYS[i], ARGV[at], ARGV[at + 1])
  else
    add_id(KEYS[i], 'e:' .. ARGV[at], ARGV[at + 1])
  end
end
write_totals()
return ring(KEYS[2], ARGV[1])
