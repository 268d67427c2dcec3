-- publish: the policy version `step` is live.
-- Uses: steps.
-- ARGV: step, epoch.
-- Effect: the version moves up to step; the pipeline slots of every claim <= step are free.
-- Idempotent: a step at or below the version changes nothing. Fenced by the epoch.
-- Reply: {'ok'} | {'order', claimed step} | {'fenced', epoch}
local step, epoch = tonumber(ARGV[1]), ARGV[2]
local refused = fenced(epoch)
if refused then return refused end
local version, claimed_step = numbers('version', 'claimed_step')
if step > claimed_step then return {'order', claimed_step} end
run_even_when_full()
for _, s in ipairs(redis.call('ZRANGEBYSCORE', CLAIMS, '-inf', step)) do
  local record = redis.call('HMGET', claim_key(s), 'groups', 'published')
  if record[2] ~= '1' then
    redis.call('HSET', claim_key(s), 'published', 1)
    add('unpublished', -#ids(record[1]))
  end
end
if step > version then set('version', step) end
return {'ok'}
