-- forget: delete a stream after its stream entries moved, unless it has grown meanwhile.
-- KEYS 1 stream
-- ARGV 1 id of the last moved stream entry
-- Returns 1 if it is gone, 0 if there is more to move.
if #redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', 1) > 0 then return 0 end
redis.call('DEL', KEYS[1])
return 1
