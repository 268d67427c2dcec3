-- common: names and moves every script needs; the loader puts this text in front of each of them, followed by the parts
-- its `Uses:` line names (groups, data, steps).
-- KEYS[1] = "ddrl:{run}:"; every other key is that prefix plus a suffix, so one hash tag holds the whole run
--           in one cluster slot.
-- Group sets: live = leased + ready (score = index); leases = being made (score = deadline, ms of Redis TIME);
--             pool = waiting for the next attempt (score = index); ready (score = policy version);
--             bitmaps settled/evicted/dead hold one bit per finished index, which makes finishing idempotent.
-- Replies: {status, …}; the first element is always a string.
local P = KEYS[1]
local META, TOKENS, TRASH = P .. 'meta', P .. 'tokens', P .. 'trash'
local LIVE, READY, LEASES, POOL = P .. 'live', P .. 'ready', P .. 'leases', P .. 'pool'

if redis.call('HEXISTS', META, 'slots') == 0 then
  return {'uninitialised'}
end

local function numbers(...)
  local values = redis.call('HMGET', META, ...)
  for i = 1, #values do values[i] = tonumber(values[i]) or 0 end
  return unpack(values)
end

local function set(...) redis.call('HSET', META, ...) end
local function add(field, amount)
  if amount ~= 0 then redis.call('HINCRBY', META, field, amount) end  -- Lua's -0 is no integer to Redis
end
local function group_key(g) return P .. 'group:' .. g end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
