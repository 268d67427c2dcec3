-- Shared by all job scripts. KEYS[1] is the prefix of every key, with a hash tag, so that all of them share a slot.
local p = KEYS[1]

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function job_key(id) return p .. 'job:' .. id end

-- Takes a job out of everything that counts or orders unfinished jobs, and drops its payload.
local function unlist(id)
  local size = redis.call('HGET', p .. 'sizes', id)
  if size then
    redis.call('HDEL', p .. 'sizes', id)
    redis.call('DECRBY', p .. 'bytes', size)
  end
  redis.call('ZREM', p .. 'queue', id)
  redis.call('ZREM', p .. 'running', id)
  redis.call('ZREM', p .. 'unfinished', id)
  redis.call('DEL', p .. 'in:' .. id)
end

-- The one way a job ends. Its record outlives its answer by `tombstone` ms, so that a late question gets "expired".
local function end_job(id, state, problem, answer, now, ttl, tombstone)
  unlist(id)
  redis.call('HSET', job_key(id), 'state', state, 'finished', now, 'expires', now + ttl, 'problem', problem)
  redis.call('HDEL', job_key(id), 'token')
  redis.call('PEXPIREAT', job_key(id), now + ttl + tombstone)
  if answer ~= '' then
    redis.call('SET', p .. 'out:' .. id, answer, 'PX', ttl)
  end
end

-- Jobs whose time ran out before they ended.
local function expire_late(now)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', p .. 'unfinished', '-inf', now)) do
    unlist(id)
    if redis.call('EXISTS', job_key(id)) == 1 then
      redis.call('HSET', job_key(id), 'state', 'expired', 'finished', now)
    end
  end
end

local function held(id, token)
  local found = redis.call('HMGET', job_key(id), 'state', 'token')
  return found[1] == 'running' and found[2] == token
end
