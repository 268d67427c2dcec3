-- extend: heartbeat of a lease.
-- Uses: nothing more.
-- ARGV: group, token.
-- Effect: moves the deadline to now + lease_s; a lease that expired but was given to nobody else is taken back.
-- Idempotent: a later heartbeat only moves the deadline further.
-- Reply: {'ok'} | {'lost'}
local g, token = ARGV[1], ARGV[2]
if redis.call('HGET', TOKENS, token) ~= g then return {'lost'} end
redis.call('ZREM', POOL, g)
redis.call('ZADD', LEASES, now_ms() + numbers('lease_ms'), g)
return {'ok'}
