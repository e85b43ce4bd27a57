-- free: take ids out of pending whose stream entries are lost, unless the stream has grown since they were looked for.
-- KEYS 1 stream, then pending maps; totals
-- ARGV 1 last id of the stream when they were looked for, then per pending: n, n ids
-- Returns 1, or 0 if the stream has grown: one of the ids may have been appended again.
totals = table.remove(KEYS)
local last = '0-0'
if redis.call('EXISTS', KEYS[1]) == 1 then last = stream_facts(KEYS[1]) end
if last ~= ARGV[1] then return 0 end
local at = 2
for i = 2, #KEYS do at = drop_listed(KEYS[i], at) end
write_totals()
redis.call('HSET', totals, 'stuck', '0', 'freed_at_ms', now_ms())
return 1
