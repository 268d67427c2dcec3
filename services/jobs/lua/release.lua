-- ARGV: id, token, delay ms, 1 if this was a try → 1: queued again, to be claimed after the delay; 0 when no longer ours
if not held(ARGV[1], ARGV[2]) then return 0 end
redis.call('ZREM', p .. 'running', ARGV[1])
redis.call('HSET', job_key(ARGV[1]), 'state', 'queued')
redis.call('HINCRBY', job_key(ARGV[1]), 'lost', ARGV[4])
redis.call('HDEL', job_key(ARGV[1]), 'token')
redis.call('ZADD', p .. 'queue', now_ms() + tonumber(ARGV[3]), ARGV[1])
return 1
