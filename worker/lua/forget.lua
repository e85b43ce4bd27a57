-- forget: a stream whose entries were moved elsewhere is deleted, unless somebody has appended to it meanwhile.
-- KEYS 1 stream
-- ARGV 1 id of the last entry that was moved
-- Returns 1 when it is gone, 0 when there is more to move.
local about = redis.call('XINFO', 'STREAM', KEYS[1])
for at = 1, #about, 2 do
  if about[at] == 'last-generated-id' and about[at + 1] ~= ARGV[1] then return 0 end
end
redis.call('DEL', KEYS[1])
return 1
