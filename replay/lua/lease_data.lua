-- lease_data: give out the next data batch to be produced.
-- Uses: data.
-- ARGV: token (fresh per request), owner.
-- Effect: the lowest expired index is leased again, else the next index is opened while fewer than
--         data_depth are unclaimed and fewer than data_retained are unsettled.
-- Idempotent: the same token again returns the same index.
-- Reply: {'ok', batch} | {'wait'} | {'no_data'}
local token, owner = ARGV[1], ARGV[2]
local held = redis.call('HGET', TOKENS, token)
if held then return {'ok', tonumber(held)} end
local D, depth, retained = numbers('D', 'data_depth', 'data_retained')
local next_data, data_floor, lease_ms = numbers('next_data', 'data_floor', 'lease_ms')
if D == 0 then return {'no_data'} end
local now = now_ms()

local batch
for _, k in ipairs(redis.call('ZRANGEBYSCORE', DATA_LEASES, '-inf', now)) do
  batch = math.min(batch or tonumber(k), tonumber(k))
end
if batch then
  local old = redis.call('HGET', data_key(batch), 'token')
  if old then redis.call('HDEL', TOKENS, old) end
else
  if redis.call('ZCARD', DATA_LIVE) >= depth or next_data - data_floor >= retained then return {'wait'} end
  batch = next_data
  set('next_data', next_data + 1)
end
redis.call('HSET', data_key(batch), 'token', token, 'owner', owner)
redis.call('HSET', TOKENS, token, batch)
redis.call('ZADD', DATA_LIVE, batch, batch)
redis.call('ZADD', DATA_LEASES, now + lease_ms, batch)
return {'ok', batch}
