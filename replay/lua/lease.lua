-- lease: give out the next group to be made.
-- ARGV: token (fresh per request), owner.
-- Effect: expired leases spend an attempt and go to the pool (or die); the lowest pooled index is leased again,
--         else a new index is opened if pipeline slots, retained groups and bytes allow.
-- Idempotent: asked again with the same token (a lost reply), it returns the same lease.
-- Reply: {'ok', group, attempt, min_version, epoch} | {'wait', why} | {'no_groups'}
local token, owner = ARGV[1], ARGV[2]

local function lease_reply(g)
  local f = redis.call('HMGET', group_key(g), 'attempt', 'min_version', 'epoch')
  return {'ok', tonumber(g), tonumber(f[1]), tonumber(f[2]), tonumber(f[3])}
end

local held = redis.call('HGET', TOKENS, token)
if held then return lease_reply(held) end

local version, epoch, lease_ms, G, W = numbers('version', 'epoch', 'lease_ms', 'G', 'W')
if G == 0 then return {'no_groups'} end
local now = now_ms()

local function grant(g, rank)
  local record = group_key(g)
  local old = redis.call('HGET', record, 'token')
  if old then redis.call('HDEL', TOKENS, old) end
  local least = math.min(version, needed_version(rank, math.ceil((W - 1) / G)))
  redis.call('HINCRBY', record, 'attempt', 1)
  redis.call('HSET', record, 'token', token, 'owner', owner, 'granted', version, 'min_version', least, 'epoch', epoch)
  redis.call('HSET', TOKENS, token, g)
  redis.call('ZREM', POOL, g)
  redis.call('ZADD', LIVE, g, g)
  redis.call('ZADD', LEASES, now + lease_ms, g)
  return lease_reply(g)
end

for _, g in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now)) do
  spend(g, 'lease expired (' .. (redis.call('HGET', group_key(g), 'owner') or '?') .. ')', false)
end

local waiting = redis.call('ZRANGE', POOL, 0, 0)[1]
if waiting then
  local rank = redis.call('ZRANK', LIVE, waiting)
  if needed_version(rank) <= version then return grant(waiting, rank) end
  return {'wait', 'version'}
end

local slots, retained, max_bytes = numbers('slots', 'retained', 'max_bytes')
local unpublished, claimed, bytes, largest, next_group =
  numbers('unpublished', 'claimed', 'bytes', 'largest_group', 'next_group')
local live = redis.call('ZCARD', LIVE)
if live + unpublished >= slots then return {'wait', 'slots'} end
if live + claimed >= retained then return {'wait', 'retained'} end
if bytes + (redis.call('ZCARD', LEASES) + 1) * largest > max_bytes then return {'wait', 'bytes'} end
if needed_version(live) > version then return {'wait', 'version'} end
set('next_group', next_group + 1)
return grant(next_group, live)
