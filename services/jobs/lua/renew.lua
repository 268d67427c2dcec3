-- ARGV: id, token, lease ms → 1, or 0 when the job is no longer ours (cancelled, expired, claimed by another)
local now = now_ms()
expire_late(now)
if not held(ARGV[1], ARGV[2]) then return 0 end
redis.call('ZADD', p .. 'running', now + tonumber(ARGV[3]), ARGV[1])
return 1
