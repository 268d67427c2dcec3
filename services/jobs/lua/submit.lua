-- ARGV: id, kind, meta, payload, ttl ms, tombstone ms, most unfinished jobs, most bytes, idempotency key or '', fingerprint
-- → {'new', id} | {'known', id} | {'conflict', id} | {'full', unfinished}
local id, kind, meta, payload = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local ttl, tombstone = tonumber(ARGV[5]), tonumber(ARGV[6])
local now = now_ms()
local idem = p .. 'idem:' .. ARGV[9]
if ARGV[9] ~= '' then
  local known = redis.call('HMGET', idem, 'id', 'fingerprint')
  if known[1] then
    return {known[2] == ARGV[10] and 'known' or 'conflict', known[1]}
  end
end
if redis.call('EXISTS', job_key(id)) == 1 then return {'new', id} end -- the first reply was lost on its way
expire_late(now)
local unfinished = redis.call('HLEN', p .. 'sizes')
local bytes = tonumber(redis.call('GET', p .. 'bytes') or '0')
if unfinished >= tonumber(ARGV[7]) or (unfinished > 0 and bytes + #payload > tonumber(ARGV[8])) then
  return {'full', unfinished}
end
redis.call('HSET', job_key(id), 'state', 'queued', 'kind', kind, 'meta', meta, 'created', now, 'expires', now + ttl, 'attempts', 0, 'lost', 0, 'problem', '')
redis.call('PEXPIREAT', job_key(id), now + ttl + tombstone)
redis.call('SET', p .. 'in:' .. id, payload, 'PX', ttl)
redis.call('HSET', p .. 'sizes', id, #payload)
redis.call('INCRBY', p .. 'bytes', #payload)
redis.call('ZADD', p .. 'unfinished', now + ttl, id)
redis.call('ZADD', p .. 'queue', now, id)
if ARGV[9] ~= '' then
  redis.call('HSET', idem, 'id', id, 'fingerprint', ARGV[10])
  redis.call('PEXPIRE', idem, ttl)
end
return {'new', id}
