-- look: note stream entries that left the stream, and no script of ours disposed of: they are lost. The first look at a
-- stream notes where its count begins.
-- While workers of an older release are about, which write no totals, theirs count as disposed of.
-- KEYS 1 stream, 2 totals, 3… counters that older workers keep of the last minutes
-- Returns the number of stream entries that it found lost.
local length, added = redis.call('XLEN', KEYS[1]), 0
if redis.call('EXISTS', KEYS[1]) == 1 then added = select(2, stream_facts(KEYS[1])) end
local disposed, base, before, had, since = unpack(
  redis.call('HMGET', KEYS[2], 'disposed', 'base', 'length', 'added', 'lost_at_ms'))
local missing = added - length - tonumber(disposed or '0') - tonumber(base or '0')
if base and missing == 0 and before == integer(length) and had == integer(added) then return 0 end

redis.call('HINCRBY', KEYS[2], 'base', integer(missing))
redis.call('HSET', KEYS[2], 'length', integer(length), 'added', integer(added))
if not base then return 0 end
-- A deleted stream counts from 0 again. What it held at the last look is gone, unless a drain took it meanwhile.
local is_another = missing < 0 or added < tonumber(had or '0')
local lost = is_another and tonumber(before or '0') or missing
if lost == 0 or redis.call('EXISTS', unpack(KEYS, 3)) > 0 then return 0 end
redis.call('HINCRBY', KEYS[2], 'lost', integer(lost))
if not since then redis.call('HSET', KEYS[2], 'lost_at_ms', now_ms()) end
return lost
