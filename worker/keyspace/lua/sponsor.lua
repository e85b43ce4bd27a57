-- Shared by the scripts of the sponsorship pool, put behind common.lua; mirrors worker/rules/sponsorship.py.
-- What is held counts in two pending maps: of the pool (`promised`) and of the user's window (`today`). A window also
-- has its `start`, and what was `absorbed` in it: what an older one held has no id in a newer, so whatever becomes of
-- it never counts there.

local REQUEST = {
  'state', 'user', 'mode', 'estimate', 'paid', 'held', 'expires_ms', 'window', 'tier', 'budget', 'taken', 'left',
  'actual', 'absorbed', 'late'}

-- The hold of a request: what was asked and found, what is held, and what became of it.
local function read_request(key)
  local request = {}
  for i, value in ipairs(redis.call('HMGET', key, unpack(REQUEST))) do request[REQUEST[i]] = value end
  return request
end

local function is_open(start, day_ms, now)
  return start and tonumber(start) + tonumber(day_ms) > tonumber(now)
end

-- What decides about a user: tier and budget in force, the open window and what is taken of it, what is left of the
-- pool, and the room that both leave. Holds that are due leave first.
-- KEYS 1 pool, 2 promised, 3 holds, 4 standing, 5 today, 6 holds of the user, in every script that asks.
-- `tier` is the one that the host says, or ''. The pairs of ARGV from `at` on are tier and daily budget, the lowest
-- tier first: a tier not among them counts as that.
-- `promised` and `taken` are the totals of both maps, once the holds that are due have left.
-- Returns nil and the answer that names what must be loaded, where something is not cached.
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

-- The start of the window that something is about to be counted in; opens one where none is open.
local function open_window(found, day_ms, now)
  if found.in_redis then return found.window end
  local start = found.window or now
  redis.call('DEL', KEYS[5])
  redis.call('HSET', KEYS[5], 'start', start, 'absorbed', found.taken, 'total', found.taken)
  redis.call('PEXPIREAT', KEYS[5], integer(tonumber(start) + tonumber(day_ms)))
  return start
end

-- Counts what was absorbed in the user's window.
local function count_absorbed(amount)
  redis.call('HINCRBY', KEYS[5], 'absorbed', amount)
  redis.call('HINCRBY', KEYS[5], 'total', amount)
end

-- Appends an entry for the pool's books, and rings once per waiting drain. Returns 1 when the bell must ring.
local function tell(stream, rung, ring_ttl_ms, ...)
  redis.call('XADD', stream, '*', 'v', '1', ...)
  return redis.call('SET', rung, '1', 'NX', 'PX', ring_ttl_ms) and 1 or 0
end
