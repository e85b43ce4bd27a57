-- expire: take expired holds of one user and meter out of pending, and note when to look again.
-- KEYS 1 pending, 2 holds, 3 expiries, 4 totals
-- ARGV 1 `user:meter`
totals = table.remove(KEYS)
local now = now_ms()
expire_holds(KEYS[1], KEYS[2], now)
local next_one = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
if next_one[2] then
  redis.call('ZADD', KEYS[3], next_one[2], ARGV[1])
else
  redis.call('ZREM', KEYS[3], ARGV[1])
end
return 1
