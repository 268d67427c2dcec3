-- ARGV: id, ttl ms, tombstone ms → 1: was unfinished and is cancelled; 0: had ended, or is not known
local now = now_ms()
expire_late(now)
local state = redis.call('HGET', job_key(ARGV[1]), 'state')
if state ~= 'queued' and state ~= 'running' then return 0 end
end_job(ARGV[1], 'cancelled', '', '', now, tonumber(ARGV[2]), tonumber(ARGV[3]))
return 1
