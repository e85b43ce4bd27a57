-- recent: how many of the latest stream entries were no events? It counts in windows of a least size, which begin with
-- one that is no event; a drain that finds none need not call it.
-- KEYS 1 stream, 2 window
-- ARGV 1 stream entries of a batch that is still in the stream, 2 number at its beginning that do not count, 3 number of
--      the others that are no events, 4 least size of a window, 5 percentage that is too many, 6 its life, ms
-- Returns {stream entries, no events} if there are too many, also when repeated; else nil.
local function disposed_of()
  local info, at = redis.call('XINFO', 'STREAM', KEYS[1]), {}
  for i = 1, #info, 2 do at[info[i]] = info[i + 1] end
  return at['entries-added'] - at['length']
end

local before = disposed_of()
local from, none = unpack(redis.call('HMGET', KEYS[2], 'from', 'none'))
-- A deleted stream counts from 0.
if not from or tonumber(from) > before then from, none = before + tonumber(ARGV[2]), 0 end
local entries = before + tonumber(ARGV[1]) - tonumber(from)
-- A repeated batch counts its own again: there cannot be more than stream entries.
none = math.min(tonumber(none) + tonumber(ARGV[3]), entries)
if entries >= tonumber(ARGV[4]) then
  if none * 100 >= entries * tonumber(ARGV[5]) then return {entries, none} end
  redis.call('DEL', KEYS[2])
  return nil
end
redis.call('HSET', KEYS[2], 'from', integer(tonumber(from)), 'none', integer(none))
redis.call('PEXPIRE', KEYS[2], ARGV[6])
return nil
