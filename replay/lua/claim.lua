-- claim: fix the groups and data batches of one learner step.
-- Uses: groups, data, steps.
-- ARGV: step, epoch.
-- Effect: ready groups outside the staleness bound are evicted; then G groups are taken, oldest index first, never
--         reaching W or more indices past the oldest live one, together with the next D data batches.
-- Idempotent: a step that has a claim returns that claim, also after a rollback. Fenced by the epoch.
-- Reply: {'ok', {group, header, ref, leased_at, ready_at, …}, {batch, checksum, ref, …}, claimed_at} | {'wait', trash?}
--        | {'settled', step} | {'order', expected step} | {'fenced', epoch}
local step, epoch = tonumber(ARGV[1]), ARGV[2]
local refused = fenced(epoch)
if refused then return refused end

local function fields(reply, id, record, ...)
  reply[#reply + 1] = id
  for _, value in ipairs(redis.call('HMGET', record, ...)) do reply[#reply + 1] = value end
end

local function claim_reply(groups, data, claimed_at)
  local group_part, data_part = {}, {}
  for _, g in ipairs(groups) do fields(group_part, g, group_key(g), 'header', 'ref', 'leased_at', 'ready_at') end
  for _, k in ipairs(data) do fields(data_part, k, data_key(k), 'checksum', 'ref') end
  return {'ok', group_part, data_part, tonumber(claimed_at)}
end

local settled_step, claimed_step, G, D, S, W, data_next = numbers(
  'settled_step', 'claimed_step', 'G', 'D', 'S', 'W', 'data_next')
if step <= settled_step then return {'settled', settled_step} end
local known = redis.call('HMGET', claim_key(step), 'groups', 'data', 'claimed_at')
if known[1] then return claim_reply(ids(known[1]), ids(known[2]), known[3]) end
if step ~= claimed_step + 1 then return {'order', claimed_step + 1} end

run_even_when_full()
for _, g in ipairs(redis.call('ZRANGEBYSCORE', READY, '-inf', step - 1 - S - 1)) do evict(g, 'stale') end
for _, g in ipairs(redis.call('ZRANGEBYSCORE', READY, step, '+inf')) do evict(g, 'lineage') end
local wait = {'wait', redis.call('SCARD', TRASH)}

local data = {}
for k = data_next, data_next + D - 1 do
  if not redis.call('ZSCORE', DATA_READY, k) then return wait end
  data[#data + 1] = k
end

if redis.call('ZCARD', READY) < G then return wait end
local groups = {}
if G > 0 then
  local candidates = ids(table.concat(redis.call('ZRANGE', LIVE, 0, G + W - 2), ' '))
  local ready = redis.call('ZMSCORE', READY, unpack(candidates))
  local first, taken = 1, {}  -- place of the oldest live group not taken; places taken
  for _ = 1, G do
    local place, last = first, (candidates[first] or 0) + W - 1
    while candidates[place] and (taken[place] or not ready[place]) do place = place + 1 end
    if not candidates[place] or candidates[place] > last then return wait end
    groups[#groups + 1], taken[place] = candidates[place], true
    while taken[first] do first = first + 1 end
  end
  table.sort(groups)
  redis.call('ZREM', LIVE, unpack(groups))
  redis.call('ZREM', READY, unpack(groups))
end
for _, k in ipairs(data) do
  redis.call('ZREM', DATA_LIVE, k)
  redis.call('ZREM', DATA_READY, k)
end
local now = now_ms()
redis.call('HSET', claim_key(step), 'groups', table.concat(groups, ' '),
  'data', table.concat(data, ' '), 'published', 0, 'claimed_at', now)
redis.call('ZADD', CLAIMS, step, step)
redis.call('DEL', P .. 'dropped')
add('claimed', #groups)
add('unpublished', #groups)
set('data_next', data_next + D, 'claimed_step', step)
return claim_reply(groups, data, now)
