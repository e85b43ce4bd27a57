-- extent: how far a stream may be read at once, so that the memory of a reader is bounded whatever producers put there.
-- KEYS 1 stream
-- ARGV 1 where to begin, 2 entries at most, 3 bytes at most, 4 and 5 bytes and fields that an entry may have,
--      6 bytes that are kept of a larger one
-- Returns {'none'}; {'all', id} when the whole stream is smaller than that, up to its last id; {'part', id, bytes, more}
-- when everything from the beginning up to `id` is; {'cut', id, bytes, text} when the first entry is too large: what is kept
-- of its event, or of all its fields where it has none, and how large that was. Of a short stream the entries themselves
-- are returned, which saves a way: {'few', entries, bytes, more}.
-- A stream that is small altogether costs one look. In a larger one each entry is looked at, which costs more than reading.
local FEW = 4
local STEP = 32 -- entries that Lua holds at a time
local PART_BYTES = 64 -- what a name or a value costs a reader beside its bytes
local start, count, room = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local entry_bytes, entry_parts = tonumber(ARGV[4]), 2 * tonumber(ARGV[5])

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
-- By a few samples first: only what looks small is counted in full.
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
  if #entries < asked then return last and answer(0) or {'none'} end
  start, step = '(' .. last, math.min(2 * step, STEP)
end
return answer(1)
