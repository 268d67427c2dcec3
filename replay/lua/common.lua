-- common: names and moves shared by every script; the loader puts this text in front of each of them.
-- KEYS[1] = "ddrl:{run}:"; every other key is that prefix plus a suffix, so one hash tag holds the whole run
--           in one cluster slot.
-- Group sets: live = leased + ready (score = index); leases = being made (score = deadline, ms of Redis TIME);
--             pool = waiting for the next attempt (score = index); ready (score = policy version);
--             bitmaps settled/evicted/dead hold one bit per finished index, which makes finishing idempotent.
-- Replies: {status, …}; the first element is always a string.
local P = KEYS[1]
local META, LIVE, READY, LEASES, POOL = P .. 'meta', P .. 'live', P .. 'ready', P .. 'leases', P .. 'pool'
local TOKENS, CLAIMS, TRASH = P .. 'tokens', P .. 'claims', P .. 'trash'
local DEAD, FLOORS = P .. 'dead_letters', P .. 'floors'
local DATA_LIVE, DATA_READY, DATA_LEASES = P .. 'data_live', P .. 'data_ready', P .. 'data_leases'

if redis.call('HEXISTS', META, 'slots') == 0 then
  return {'uninitialised'}
end

local function numbers(...)
  local values = redis.call('HMGET', META, ...)
  for i = 1, #values do values[i] = tonumber(values[i]) or 0 end
  return unpack(values)
end

local function set(field, value) redis.call('HSET', META, field, value) end
local function add(field, amount)
  if amount ~= 0 then redis.call('HINCRBY', META, field, amount) end  -- Lua's -0 is no integer to Redis
end
local function group_key(g) return P .. 'group:' .. g end
local function data_key(k) return P .. 'data:' .. k end
local function claim_key(step) return P .. 'claim:' .. step end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function ids(text)
  local out = {}
  for id in string.gmatch(text or '', '%d+') do out[#out + 1] = tonumber(id) end
  return out
end

-- A server at its maxmemory refuses a script whose first write may allocate, and would so refuse the very calls that
-- free memory. A deletion may always run, and after one write the script runs to its end.
local function run_even_when_full() redis.call('DEL', P .. 'full') end

-- A learner of an older epoch must not move the ledger.
local function fenced(epoch)
  local current = numbers('epoch')
  if tonumber(epoch) == current then return nil end
  return {'fenced', current}
end

-- Payloads are deleted by the client, at least once: the reference waits in `trash` until the client confirms.
local function drop_payload(record)
  local held = redis.call('HMGET', record, 'bytes', 'ref')
  if held[2] then
    add('bytes', -held[1])
    redis.call('SADD', TRASH, held[2])
  end
end

-- A group reaches its end: no payload, no record, one bit.
local function finish(g, outcome)
  drop_payload(group_key(g))
  local token = redis.call('HGET', group_key(g), 'token')
  if token then redis.call('HDEL', TOKENS, token) end
  for _, name in ipairs({LIVE, READY, LEASES, POOL}) do redis.call('ZREM', name, g) end
  redis.call('DEL', group_key(g))
  if redis.call('SETBIT', P .. outcome, g, 1) == 0 then add(outcome, 1) end
end

local function evict(g, reason)
  finish(g, 'evicted')
  add('evicted:' .. reason, 1)
end

-- The group waits for its next attempt; the token dies with the lease only when `revoke` is set.
local function to_pool(g, revoke)
  redis.call('ZREM', LEASES, g)
  redis.call('ZADD', POOL, g, g)
  if revoke then
    local token = redis.call('HGET', group_key(g), 'token')
    if token then redis.call('HDEL', TOKENS, token) end
    redis.call('HSET', group_key(g), 'token', '')
  end
end

-- One attempt is spent. Returns 'dead' or 'pool'.
local function spend(g, reason, revoke)
  set('last_failure', 'group ' .. g .. ': ' .. reason)
  if redis.call('HINCRBY', group_key(g), 'spent', 1) >= numbers('max_attempts') then
    finish(g, 'dead')
    redis.call('LPUSH', DEAD, g .. ' ' .. reason)
    redis.call('LTRIM', DEAD, 0, 999)
    return 'dead'
  end
  to_pool(g, revoke)
  return 'pool'
end

-- A group made by weights of a lineage that a rollback cut off: evicted, or made again under the same index.
local function cut_off(g)
  if numbers('remake') == 0 then return evict(g, 'lineage') end
  drop_payload(group_key(g))
  redis.call('HDEL', group_key(g), 'ref', 'bytes', 'version', 'header')
  redis.call('ZREM', READY, g)
  to_pool(g, true)
  add('remade', 1)
end

-- A version is (lineage epoch, step): it is alive when no later rollback went below it.
local function version_alive(lineage, version)
  for epoch = lineage + 1, numbers('epoch') do
    local floor = redis.call('HGET', FLOORS, epoch)
    if floor and version > tonumber(floor) then return false end
  end
  return true
end

-- Least policy version with which group number `rank` among the live ones (0-based) stays within the bound at the
-- step that is expected to claim it. `slack` = steps by which the FIFO window may delay it.
local function needed_version(rank, slack)
  local claimed_step, G, S = numbers('claimed_step', 'G', 'S')
  return math.max(0, claimed_step + math.floor(rank / G) + (slack or 0) - S)
end

local function drop_data(k)
  drop_payload(data_key(k))
  local token = redis.call('HGET', data_key(k), 'token')
  if token then redis.call('HDEL', TOKENS, token) end
  for _, name in ipairs({DATA_LIVE, DATA_READY, DATA_LEASES}) do redis.call('ZREM', name, k) end
  redis.call('DEL', data_key(k))
end

-- Settles every claim <= step; frees what it held.
local function settle_through(step)
  for _, s in ipairs(redis.call('ZRANGEBYSCORE', CLAIMS, '-inf', step)) do
    local record = redis.call('HMGET', claim_key(s), 'groups', 'data', 'published')
    local groups, data = ids(record[1]), ids(record[2])
    for _, g in ipairs(groups) do finish(g, 'settled') end
    for _, k in ipairs(data) do
      drop_data(k)
      if k >= numbers('data_floor') then set('data_floor', k + 1) end
    end
    add('claimed', -#groups)
    if record[3] ~= '1' then add('unpublished', -#groups) end
    redis.call('DEL', claim_key(s))
    redis.call('ZREM', CLAIMS, s)
  end
  if step > numbers('settled_step') then set('settled_step', step) end
end
