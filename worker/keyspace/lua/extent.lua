-- extent: how far may a drain read at once? It bounds the memory of a reader, whatever producers append.
-- KEYS 1 stream
-- ARGV 1 id to begin with, 2 most stream entries, 3 most bytes, 4 and 5 most bytes and fields of a stream entry,
--      6 bytes kept of a larger one
-- Returns one of
--   {'none'};
--   {'all', id}: the whole stream, up to its last id, is within the bounds;
--   {'part', id, bytes, more}: the stream from the beginning up to `id` is;
--   {'cut', id, bytes, text}: the first stream entry is too large; the kept text of its event, or of all its fields
--      without an event, and the full size;
--   {'few', entries, bytes, more}: the stream entries of a short stream themselves, which saves a round trip.
-- A small stream costs one look. In a larger one the script looks at each stream entry, which costs more than reading.
local FEW = 4
local STEP = 32 -- stream entries that Lua holds at a time
local PART_BYTES = 64 -- a reader's cost of a name or a value beside its bytes
local start, count, room = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local entry_bytes, entry_parts = tonumber(ARGV[4]), 2 * tonumber(ARGV[5])

-- No id can follow it, and Redis refuses to read after it.
local LAST_ID = '18446744073709551615-18446744073709551615'

local function is_small(...)
  return redis.call('MEMORY', 'USAGE', KEYS[1], ...) <= room
end

local function last_id()
  local info = redis.call('XINFO', 'STREAM', KEYS[1])
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] end
  end
end

local function cut(id, fields)
  local text
  for i = 1, #fields, 2 do
    if fields[i] == 'e' then text = fields[i + 1] end
  end
  text = text or table.concat(fields, '\n')
  return {'cut', id, #text, string.sub(text, 1, ARGV[6])}
end

local length = redis.call('XLEN', KEYS[1])
if length == 0 then return {'none'} end
local few = length <= FEW and {}
-- A few samples first: it counts in full only a stream that looks small.
if not few and is_small() and is_small('SAMPLES', '0') then return {'all', last_id()} end

local last, bytes, found, step = nil, 0, 0, 1
local function answer(more)
  if few then return {'few', few, bytes, more} end
  return {'part', last, bytes, more}
end

while found < count do
  local asked = math.min(step, count - found)
  local entries = redis.call('XRANGE', KEYS[1], start, '+', 'COUNT', asked)
  for i = 1, #entries do
    local id, fields = entries[i][1], entries[i][2]
    local size = 0
    for j = 1, #fields do size = size + #fields[j] end
    local too_large = size > entry_bytes or #fields > entry_parts
    size = size + PART_BYTES * #fields
    if last and (too_large or bytes + size > room) then return answer(1) end
    if too_large then return cut(id, fields) end
    last, bytes, found = id, bytes + size, found + 1
    if few then few[found] = entries[i] end
  end
  if #entries < asked or last == LAST_ID then return last and answer(0) or {'none'} end
  start, step = '(' .. last, math.min(2 * step, STEP)
end
return answer(1)
