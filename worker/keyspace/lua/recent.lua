-- recent: how many of the latest entries of a stream were no events? Counted in windows of so many entries at least, which
-- begin with an entry that is none; whoever finds none need not ask.
-- KEYS 1 stream, 2 window
-- ARGV 1 entries of a batch that is in the stream still, 2 how many of them at its beginning do not count, 3 how many of
--      the others are no events, 4 entries of a window at least, 5 percent of them that are too many, 6 its life, ms
-- Returns {entries, no events} when there are too many, as often as it is asked; else nil.
local function disposed_of()
  local info, at = redis.call('XINFO', 'STREAM', KEYS[1]), {}
  for i = 1, #info, 2 do at[info[i]] = info[i + 1] end
  return at['entries-added'] - at['length']
end

local before = disposed_of()
local from, none = unpack(redis.call('HMGET', KEYS[2], 'from', 'none'))
-- A stream that was deleted counts from nothing.
if not from or tonumber(from) > before then from, none = before + tonumber(ARGV[2]), 0 end
local entries = before + tonumber(ARGV[1]) - tonumber(from)
-- A batch that comes again counts its own again: there cannot be more than entries.
none = math.min(tonumber(none) + tonumber(ARGV[3]), entries)
if entries >= tonumber(ARGV[4]) then
  if none * 100 >= entries * tonumber(ARGV[5]) then return {entries, none} end
  redis.call('DEL', KEYS[2])
  return nil
end
redis.call('HSET', KEYS[2], 'from', integer(tonumber(from)), 'none', integer(none))
redis.call('PEXPIRE', KEYS[2], ARGV[6])
return nil
