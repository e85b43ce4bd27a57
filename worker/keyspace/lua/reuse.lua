-- reuse: Postgres does not answer, so the last known balance may, for a while. Its end stays: a boundary, or its age.
-- KEYS 1 balance
-- ARGV 1 ms
-- Returns 1 if there is a balance, else 0.
local now = now_ms()
local text = redis.call('GET', KEYS[1])
if not text then return 0 end
if is_stale(text, now) then
  redis.call('SET', KEYS[1], fresh_until(text, tonumber(now) + tonumber(ARGV[1])), 'KEEPTTL')
end
return 1
