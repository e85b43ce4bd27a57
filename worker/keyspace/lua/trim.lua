-- trim: delete all stream entries up to the last one of a published batch, in one command.
-- Two notes in the hand of the drain say that this may be done here, and both are missing after a failover to a copy that
-- lagged, or after a restart from an older file. The drain noted, after its read, up to which entry it had read: with that
-- note, this Redis knew all of them, and gives later ones greater ids. Each script that published noted that it did: with
-- these notes, no id is pending whose entry goes now. An older entry at the beginning is of a batch before, not published
-- here.
-- KEYS 1 stream, 2 counter of its slot of time, 3 hand, 4 totals
-- ARGV 1 token of the drain, 2 and 3 ids of the first and last stream entry of the batch, 4 the id after it,
--      then the names of the notes
-- Returns the number of deleted stream entries, or -1 if a note is missing: then nothing was deleted.
totals = table.remove(KEYS)

-- True unless the stream entry `id` is before `other`. Numbers of Lua are too short for such ids.
local function reaches(id, other)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  local other_ms, other_seq = string.match(other, '^(%d+)-(%d+)$')
  if ms ~= other_ms then return #ms > #other_ms or (#ms == #other_ms and ms > other_ms) end
  return #seq > #other_seq or (#seq == #other_seq and seq >= other_seq)
end

local noted = redis.call('HMGET', KEYS[3], 'token', 'read_to')
if noted[1] ~= ARGV[1] or not noted[2] or not reaches(noted[2], ARGV[3]) then return -1 end
local published = redis.call('HMGET', KEYS[3], unpack(ARGV, 5))
redis.call('HDEL', KEYS[3], unpack(ARGV, 5))
for i = 1, #ARGV - 4 do
  if not published[i] then return -1 end
end
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', '1')[1]
if first and not reaches(first[1], ARGV[2]) then return -1 end
local deleted = redis.call('XTRIM', KEYS[1], 'MINID', '=', ARGV[4])
count_disposed(deleted, KEYS[2])
return deleted
