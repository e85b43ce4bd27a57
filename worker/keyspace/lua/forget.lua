-- forget: a stream whose entries were moved elsewhere is deleted, unless somebody has appended to it meanwhile.
-- KEYS 1 stream
-- ARGV 1 id of the last entry that was moved
-- Returns 1 when it is gone, 0 when there is more to move.
if #redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', 1) > 0 then return 0 end
redis.call('DEL', KEYS[1])
return 1
