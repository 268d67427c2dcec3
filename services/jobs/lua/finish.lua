-- ARGV: id, token, state, answer or '', problem or '', ttl ms, tombstone ms → 1, or 0 when the job is no longer ours
if not held(ARGV[1], ARGV[2]) then return 0 end
end_job(ARGV[1], ARGV[3], ARGV[5], ARGV[4], now_ms(), tonumber(ARGV[6]), tonumber(ARGV[7]))
return 1
