-- lease: give out the next group to be made.
-- Uses: groups.
-- ARGV: token (fresh per request), owner.
-- Effect: expired leases spend an attempt and go to the pool (or die); the lowest pooled index is leased again, else, if
--         pipeline slots, retained groups and bytes allow, the lowest dead index that `requeue` marked, else a new one.
--         Whoever has just given the next group back waits.
-- Idempotent: asked again with the same token (a lost reply), it returns the same lease.
-- Reply: {'ok', group, attempt, min_version, epoch} | {'wait', why} | {'no_groups'}
local token, owner = ARGV[1], ARGV[2]

local held = redis.call('HGET', TOKENS, token)
if held then
  local f = redis.call('HMGET', group_key(held), 'attempt', 'min_version', 'epoch')
  return {'ok', tonumber(held), tonumber(f[1]), tonumber(f[2]), tonumber(f[3])}
end

local G, S, W, slots, retained, max_bytes, lease_ms = numbers('G', 'S', 'W', 'slots', 'retained', 'max_bytes', 'lease_ms')
local version, epoch, claimed_step, unpublished, claimed, bytes, largest, next_group = numbers(
  'version', 'epoch', 'claimed_step', 'unpublished', 'claimed', 'bytes', 'largest_group', 'next_group')
if G == 0 then return {'no_groups'} end
local now = now_ms()

-- Least policy version with which group number `rank` among the live ones (0-based) stays within the bound at the
-- step that is expected to claim it. `slack` = steps by which the FIFO window may delay it.
local function needed_version(rank, slack)
  return math.max(0, claimed_step + math.floor(rank / G) + slack - S)
end

local function grant(g, rank, attempt)
  local least = math.min(version, needed_version(rank, math.ceil((W - 1) / G)))
  redis.call('HSET', group_key(g), 'token', token, 'owner', owner, 'attempt', attempt, 'granted', version,
    'min_version', least, 'epoch', epoch, 'leased_at', now)
  redis.call('HSET', TOKENS, token, g)
  redis.call('ZADD', LEASES, now + lease_ms, g)
  return {'ok', tonumber(g), attempt, least, epoch}
end

for _, g in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now)) do
  spend(g, 'lease expired (' .. (redis.call('HGET', group_key(g), 'owner') or '?') .. ')', false)
  add('expired', 1)
end

local waiting = redis.call('ZRANGE', POOL, 0, 0)[1]
if waiting then
  local rank = redis.call('ZRANK', LIVE, waiting)
  if needed_version(rank, 0) > version then return {'wait', 'version'} end
  local former = redis.call('HMGET', group_key(waiting), 'token', 'attempt', 'owner', 'rests')
  if former[3] == owner and tonumber(former[4] or 0) > now then return {'wait', 'pause'} end
  redis.call('HDEL', TOKENS, former[1])
  redis.call('HDEL', group_key(waiting), 'rests')
  redis.call('ZREM', POOL, waiting)
  return grant(waiting, rank, former[2] + 1)
end

local live = redis.call('ZCARD', LIVE)
if live + unpublished >= slots then return {'wait', 'slots'} end
if live + claimed >= retained then return {'wait', 'retained'} end
-- Every group being made is expected to come out as large as the largest so far; `commit` holds the budget strictly.
if bytes + (live - redis.call('ZCARD', READY) + 1) * largest > max_bytes then return {'wait', 'bytes'} end

local revived = redis.call('ZRANGE', P .. 'requeued', 0, 0)[1]
local rank = revived and redis.call('ZCOUNT', LIVE, '-inf', '(' .. revived) or live
if needed_version(rank, 0) > version then return {'wait', 'version'} end
if revived then
  redis.call('ZREM', P .. 'requeued', revived)
  redis.call('SETBIT', P .. 'dead', revived, 0)
  redis.call('HDEL', LETTERS, revived)
  redis.call('HDEL', DEATHS, revived)
  redis.call('LREM', DEAD, 0, revived)
  add('dead', -1)
else
  set('next_group', next_group + 1)
end
local g = revived or next_group
redis.call('ZADD', LIVE, g, g)
return grant(g, rank, 1)
