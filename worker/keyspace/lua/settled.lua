-- settled: an operator has dealt with the stream entries that were lost so far.
-- KEYS 1 totals
-- Returns their number.
local lost = redis.call('HGET', KEYS[1], 'lost') or '0'
redis.call('HDEL', KEYS[1], 'lost', 'lost_at_ms')
return tonumber(lost)
