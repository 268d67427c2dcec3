-- counts: the state of the ledger, in one consistent look.
-- Uses: steps.
-- ARGV: none. Effect: none. Idempotent: read only.
-- Reply: {'ok', name, number, …}; leased includes groups that wait for their next attempt, evicted is the sum of the
--        evicted:reason; deaths only grows, dead shrinks when a dead group is made again; oldest_… are ages in ms of the
--        longest lease in hand, ready group and claim (0 when none).
local reply = {'ok'}
local function tell(name, value)
  reply[#reply + 1] = name
  reply[#reply + 1] = value
end

local names = {
  'settled', 'evicted', 'evicted:stale', 'evicted:lineage', 'evicted:forgotten', 'evicted:zero_variance',
  'evicted:reward', 'dead', 'deaths', 'remade', 'expired', 'failed', 'given_back', 'claimed', 'unpublished', 'bytes',
  'version', 'epoch', 'next_group', 'claimed_step', 'settled_step', 'next_data', 'data_floor'}
for i, value in ipairs({numbers(unpack(names))}) do tell(names[i], value) end

local leased, waiting = redis.call('ZCARD', LEASES), redis.call('ZCARD', POOL)
tell('leased', leased + waiting)
tell('waiting', waiting)
tell('ready', redis.call('ZCARD', READY))
tell('data_ready', redis.call('ZCARD', P .. 'data_ready'))
tell('data_leased', redis.call('ZCARD', P .. 'data_leases'))
tell('trash', redis.call('SCARD', TRASH))
tell('requeued', redis.call('ZCARD', P .. 'requeued'))
tell('dropped_since_claim', redis.call('SCARD', P .. 'dropped'))

local now, ready_bytes = now_ms(), 0
local oldest_leased, oldest_ready, oldest_claimed = now, now, now
for _, g in ipairs(redis.call('ZRANGE', LEASES, 0, -1)) do
  oldest_leased = math.min(oldest_leased, tonumber(redis.call('HGET', group_key(g), 'leased_at')))
end
for _, g in ipairs(redis.call('ZRANGE', READY, 0, -1)) do
  local held = redis.call('HMGET', group_key(g), 'ready_at', 'bytes')
  oldest_ready, ready_bytes = math.min(oldest_ready, tonumber(held[1])), ready_bytes + held[2]
end
local first = redis.call('ZRANGE', CLAIMS, 0, 0)[1]
if first then oldest_claimed = tonumber(redis.call('HGET', claim_key(first), 'claimed_at')) end
tell('bytes_ready', ready_bytes)
tell('oldest_leased_ms', now - oldest_leased)
tell('oldest_ready_ms', now - oldest_ready)
tell('oldest_claimed_ms', now - oldest_claimed)
return reply
