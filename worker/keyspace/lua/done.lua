-- done: a drain removes its mark at its end.
-- KEYS 1 hand, 2 busy, 3 stream
-- ARGV 1 token
-- Returns the backlog, or -1 if the mark is another drain's.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return -1 end
redis.call('DEL', KEYS[1], KEYS[2])
return redis.call('XLEN', KEYS[3])
