-- hand: note the range that a drain has in hand, and that its owner lives.
-- KEYS 1 hand, 2 busy
-- ARGV 1 token, 2 first entry, 3 size, 4 deaths, 5 grace ms
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'first', ARGV[2], 'size', ARGV[3], 'deaths', ARGV[4])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[5])
return 1
