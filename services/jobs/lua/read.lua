-- ARGV: id → {now, answer or false, field, value, ...} or nothing
local now = now_ms()
expire_late(now)
local record = redis.call('HGETALL', job_key(ARGV[1]))
if #record == 0 then return nil end
local out = {now, redis.call('GET', p .. 'out:' .. ARGV[1])}
for _, value in ipairs(record) do out[#out + 1] = value end
return out
