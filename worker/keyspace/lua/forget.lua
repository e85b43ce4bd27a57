-- forget: delete a stream after its stream entries moved, unless it has grown meanwhile.
-- KEYS 1 stream
-- ARGV 1 id of the last moved stream entry
-- Returns 1 if it is gone, 0 if there is more to move.
-- No id can follow the last possible one, and Redis refuses to read after it.
local is_last = ARGV[1] == '18446744073709551615-18446744073709551615'
if not is_last and #redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', 1) > 0 then return 0 end
redis.call('DEL', KEYS[1])
return 1
