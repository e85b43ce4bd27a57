-- anew: a stream without stream entries whose last id is ahead of the clock of Redis begins anew. Later ids would follow
-- that id, whatever time it is; after the last possible one, Redis would refuse each XADD.
-- Nothing is lost: in this step the stream has no stream entry. A drain at work takes those that come later as late ones.
-- KEYS 1 stream, 2 totals, 3 hand
-- ARGV 1 ms by which a clock may be wrong
-- Returns the last id of the stream before, or nil if there was nothing to do.
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('XLEN', KEYS[1]) > 0 then return nil end
local last, added = stream_facts(KEYS[1])
if tonumber(string.match(last, '^%d+')) <= tonumber(now_ms()) + tonumber(ARGV[1]) then return nil end
redis.call('DEL', KEYS[1])
redis.call('HDEL', KEYS[3], 'read_to') -- an id of before, which later ones do not follow
-- It counts from 0 again: all that it had counted is as before the totals began.
if redis.call('HGET', KEYS[2], 'base') then
  redis.call('HINCRBY', KEYS[2], 'base', integer(0 - added))
  redis.call('HSET', KEYS[2], 'added', '0', 'length', '0')
end
return last
