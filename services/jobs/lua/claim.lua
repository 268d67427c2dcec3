-- ARGV: token, lease ms, most tries, problem of a job that used them up, ttl ms, tombstone ms
-- → {id, kind, meta, payload, ms until it expires, earlier tries that came to nothing} or nothing
local now = now_ms()
expire_late(now)

local function give(id)
  local found = redis.call('HMGET', job_key(id), 'kind', 'meta', 'expires', 'lost')
  return {id, found[1], found[2], redis.call('GET', p .. 'in:' .. id), found[3] - now, tonumber(found[4])}
end

-- A claim sent again, because its first reply was lost on its way, gets the same job.
local mine = redis.call('GET', p .. 'claim:' .. ARGV[1])
if mine and held(mine, ARGV[1]) then return give(mine) end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', p .. 'running', '-inf', now)) do
  redis.call('ZREM', p .. 'running', id)
  if redis.call('HINCRBY', job_key(id), 'lost', 1) >= tonumber(ARGV[3]) then
    end_job(id, 'failed', ARGV[4], '', now, tonumber(ARGV[5]), tonumber(ARGV[6]))
  else
    redis.call('HSET', job_key(id), 'state', 'queued')
    redis.call('HDEL', job_key(id), 'token')
    redis.call('ZADD', p .. 'queue', redis.call('HGET', job_key(id), 'created'), id)
  end
end
local id = redis.call('ZRANGEBYSCORE', p .. 'queue', '-inf', now, 'LIMIT', 0, 1)[1]
if not id then return nil end
redis.call('ZREM', p .. 'queue', id)
redis.call('ZADD', p .. 'running', now + tonumber(ARGV[2]), id)
redis.call('HSET', job_key(id), 'state', 'running', 'token', ARGV[1])
redis.call('HINCRBY', job_key(id), 'attempts', 1)
redis.call('SET', p .. 'claim:' .. ARGV[1], id, 'PX', ARGV[2])
return give(id)
