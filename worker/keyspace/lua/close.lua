-- close: close a hold that an applied event from a plain XADD named; the publish has removed its `h:` id.
-- KEYS 1 holds, 2 hold, then per sub-meter: holds
-- ARGV 1 hold key, 2 event id, 3 amount, 4 outcome ttl ms
-- Returns the meter of the hold, or '' if it is unknown.
redis.call('ZREM', KEYS[1], ARGV[1])
for i = 3, #KEYS do redis.call('ZREM', KEYS[i], ARGV[1]) end
if redis.call('HGET', KEYS[2], 'state') == 'held' then
  redis.call('HSET', KEYS[2], 'state', 'settled', 'before', 'held', 'event_id', ARGV[2], 'settled', ARGV[3])
  redis.call('PEXPIRE', KEYS[2], ARGV[4])
end
return redis.call('HGET', KEYS[2], 'meter') or ''
