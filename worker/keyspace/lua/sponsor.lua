-- Shared by the scripts of the sponsorship pool, after common.lua; mirrors worker/rules/sponsorship.py.
-- Held units count in two pending maps: of the pool (`promised`) and of the user's window (`today`). A window also has
-- its `start`, and the units `absorbed` in it. A hold of an older window has no id in a newer one, so it never counts
-- there.

local REQUEST = {
  'state', 'user', 'mode', 'estimate', 'paid', 'held', 'expires_ms', 'window', 'tier', 'budget', 'taken', 'left',
  'actual', 'absorbed', 'late', 'call', 'again'}

-- The hold of a request: question and answer, units held, and outcome.
local function read_request(key)
  local request = {}
  for i, value in ipairs(redis.call('HMGET', key, unpack(REQUEST))) do request[REQUEST[i]] = value end
  return request
end

local function is_open(start, day_ms, now)
  return start and tonumber(start) + tonumber(day_ms) > tonumber(now)
end

-- The facts that decide about a user: tier and budget in force, the open window and the units taken of it, the units
-- left of the pool, and the room that both leave. Expired holds leave first.
-- KEYS 1 pool, 2 promised, 3 holds, 4 standing, 5 today, 6 holds of the user, in every script that decides.
-- `tier` is the host's, or ''. The pairs of ARGV from `at` on are tier and daily budget, the lowest tier first: an
-- unknown tier counts as that. A suspended account has the tier `!` of its own, and no budget, whatever the host says.
-- `promised` and `taken` are the totals of both maps without expired holds.
-- If a fact is not cached, returns nil and the answer that names the load.
local function find(now, day_ms, tier, at)
  expire_holds(KEYS[2], KEYS[3], now)
  expire_holds(KEYS[5], KEYS[6], now)
  local standing, pool = unpack(redis.call('MGET', KEYS[4], KEYS[1]))
  if not standing then return nil, {'load'} end
  if not pool then return nil, {'load_pool'} end

  local own_tier, last_start, last_absorbed = string.match(standing, '\n(%S+) (%d+) (%d+)')
  if tier == '' then tier = own_tier end
  local found = {tier = ARGV[at], budget = ARGV[at + 1], taken = '0'}
  for i = at, #ARGV, 2 do
    if ARGV[i] == tier then found.tier, found.budget = ARGV[i], ARGV[i + 1] end
  end
  if own_tier == '!' then found.budget = '0' end
  local start, total = unpack(redis.call('HMGET', KEYS[5], 'start', 'total'))
  if is_open(start, day_ms, now) then
    found.window, found.taken, found.in_redis = start, total, true
  elseif is_open(last_start, day_ms, now) then
    found.window, found.taken = last_start, last_absorbed
  end

  found.promised = redis.call('HGET', KEYS[2], 'total') or '0'
  found.left = math.max(0, tonumber(string.match(pool, '\n(%d+)')) - tonumber(found.promised))
  found.room = math.min(found.left, math.max(0, tonumber(found.budget) - tonumber(found.taken)))
  return found
end

-- Opens a window from `start` on, unless one is open.
local function open_window(found, day_ms, start)
  if found.in_redis then return end
  redis.call('DEL', KEYS[5])
  redis.call('HSET', KEYS[5], 'start', start, 'absorbed', found.taken, 'total', found.taken)
  redis.call('PEXPIREAT', KEYS[5], integer(tonumber(start) + tonumber(day_ms)))
end

-- Counts absorbed units in the user's window.
local function count_absorbed(amount)
  redis.call('HINCRBY', KEYS[5], 'absorbed', amount)
  redis.call('HINCRBY', KEYS[5], 'total', amount)
end

-- Appends a stream entry for the pool's books, before the other writes of its script; see `append` in common.lua.
-- `trace` is '' without one.
local function tell(stream, trace, ...)
  local fields = {'v', '1', ...}
  if trace ~= '' then fields[#fields + 1], fields[#fields + 2] = 't', trace end
  redis.call('XADD', stream, '*', unpack(fields))
end
