-- claim: fix the groups and data batches of one learner step.
-- ARGV: step, epoch.
-- Effect: ready groups outside the staleness bound are evicted; then G groups are taken, oldest index first, never
--         reaching W or more indices past the oldest live one, together with the next D data batches.
-- Idempotent: a step that has a claim returns that claim, also after a rollback. Fenced by the epoch.
-- Reply: {'ok', {group, header, ref, …}, {batch, checksum, ref, …}} | {'wait', trash?} | {'settled', step}
--        | {'order', expected step} | {'fenced', epoch}
local step, epoch = tonumber(ARGV[1]), ARGV[2]
local refused = fenced(epoch)
if refused then return refused end

local function claim_reply(groups, data)
  local group_part, data_part = {}, {}
  for _, g in ipairs(groups) do
    local f = redis.call('HMGET', group_key(g), 'header', 'ref')
    group_part[#group_part + 1] = g
    group_part[#group_part + 1] = f[1]
    group_part[#group_part + 1] = f[2]
  end
  for _, k in ipairs(data) do
    local f = redis.call('HMGET', data_key(k), 'checksum', 'ref')
    data_part[#data_part + 1] = k
    data_part[#data_part + 1] = f[1]
    data_part[#data_part + 1] = f[2]
  end
  return {'ok', group_part, data_part}
end

local settled_step, claimed_step, G, D, S, W = numbers('settled_step', 'claimed_step', 'G', 'D', 'S', 'W')
if step <= settled_step then return {'settled', settled_step} end
local known = redis.call('HMGET', claim_key(step), 'groups', 'data')
if known[1] then return claim_reply(ids(known[1]), ids(known[2])) end
if step ~= claimed_step + 1 then return {'order', claimed_step + 1} end

run_even_when_full()
for _, g in ipairs(redis.call('ZRANGEBYSCORE', READY, '-inf', step - 1 - S - 1)) do evict(g, 'stale') end
for _, g in ipairs(redis.call('ZRANGEBYSCORE', READY, step, '+inf')) do evict(g, 'lineage') end
local wait = {'wait', redis.call('SCARD', TRASH)}

local data, data_next = {}, numbers('data_next')
for k = data_next, data_next + D - 1 do
  if not redis.call('ZSCORE', DATA_READY, k) then return wait end
  data[#data + 1] = k
end

if redis.call('ZCARD', READY) < G then return wait end
local candidates = ids(table.concat(redis.call('ZRANGE', LIVE, 0, G + W - 2), ' '))
local groups = {}
for _ = 1, G do
  local oldest, taken = candidates[1], nil
  for place, g in ipairs(candidates) do
    if g >= oldest + W then break end
    if redis.call('ZSCORE', READY, g) then taken = place break end
  end
  if not taken then return wait end
  groups[#groups + 1] = table.remove(candidates, taken)
end
table.sort(groups)

for _, g in ipairs(groups) do
  redis.call('ZREM', LIVE, g)
  redis.call('ZREM', READY, g)
end
for _, k in ipairs(data) do
  redis.call('ZREM', DATA_LIVE, k)
  redis.call('ZREM', DATA_READY, k)
end
redis.call('HSET', claim_key(step), 'groups', table.concat(groups, ' '),
  'data', table.concat(data, ' '), 'published', 0)
redis.call('ZADD', CLAIMS, step, step)
add('claimed', #groups)
add('unpublished', #groups)
set('data_next', data_next + D)
set('claimed_step', step)
return claim_reply(groups, data)
