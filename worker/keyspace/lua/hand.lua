-- hand: mark the range that a drain has in hand, with a sign of life of its owner.
-- KEYS 1 hand, 2 busy
-- ARGV 1 token, 2 grace ms, then 3 first stream entry, 4 size, 5 deaths; or 3 the last stream entry that it has read, which
--      trim.lua looks for; without these the mark stays as it is
-- Returns the time (ms): later reads from Postgres are not older. 0 if the mark to keep is not ours: another drain has
-- taken over.
if not ARGV[4] then
  if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
  if ARGV[3] then redis.call('HSET', KEYS[1], 'read_to', ARGV[3]) end
else
  redis.call('HSET', KEYS[1], 'token', ARGV[1], 'first', ARGV[3], 'size', ARGV[4], 'deaths', ARGV[5])
end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return now_ms()
