-- rollback: the learner starts from the checkpoint of `step`; opens a new epoch.
-- Uses: groups, data, steps, settling.
-- ARGV: step, group ids consumed since the previous checkpoint (space-separated), data ids likewise, request token.
-- Effect: 1. what the checkpoint says was consumed is settled, even if its claim record is lost;
--         2. claims > step stay and will be served again, charged to the pipeline anew; from the first on that has a
--            group of other rewards than the run expects, they are taken apart and formed anew;
--         3. live groups made by versions > step are cut off; the version becomes step.
-- Idempotent: the same request token returns the epoch it opened; a new one opens the next epoch.
-- Reply: {'ok', epoch} | {'settled', settled step} | {'conflict', text}
local step, groups, data, token = tonumber(ARGV[1]), ids(ARGV[2]), ids(ARGV[3]), ARGV[4]
local epoch, settled_step, claimed_step, data_floor = numbers('epoch', 'settled_step', 'claimed_step', 'data_floor')
if redis.call('HGET', META, 'rollback_token') == token then return {'ok', epoch} end
if step < settled_step then return {'settled', settled_step} end

local last_data = data_floor - 1
for _, k in ipairs(data) do last_data = math.max(last_data, k) end
local consumed = {}
for _, g in ipairs(groups) do
  consumed[g] = true
  for _, outcome in ipairs({'evicted', 'dead'}) do
    if redis.call('GETBIT', P .. outcome, g) == 1 then
      return {'conflict', 'group ' .. g .. ' was consumed by the checkpoint but is ' .. outcome .. ' here'}
    end
  end
end
for _, s in ipairs(redis.call('ZRANGEBYSCORE', CLAIMS, '(' .. step, '+inf')) do
  local record = redis.call('HMGET', claim_key(s), 'groups', 'data')
  for _, g in ipairs(ids(record[1])) do
    if consumed[g] then
      return {'conflict', 'group ' .. g .. ' was consumed by the checkpoint but is claimed by step ' .. s .. ' here'}
    end
  end
  for _, k in ipairs(ids(record[2])) do
    if k <= last_data then
      local clash = ' was consumed by the checkpoint but is claimed by step '
      return {'conflict', 'data batch ' .. k .. clash .. s .. ' here'}
    end
  end
end

run_even_when_full()
epoch = epoch + 1
set('epoch', epoch, 'rollback_token', token)
redis.call('HSET', P .. 'floors', epoch, step)
settle_through(step)

local next_group = numbers('next_group')
for _, g in ipairs(groups) do
  -- Indices between the ledger's end and the checkpoint's ids were opened in a tail of the log that is lost; some of
  -- them may have been settled by an earlier checkpoint, so making them again could train on them twice.
  for lost = next_group, g do
    if not consumed[lost] then evict(lost, 'forgotten') end
  end
  next_group = math.max(next_group, g + 1)
  leave_live(g)
  finish({g}, 'settled')
end
set('next_group', next_group)

for _, k in ipairs(redis.call('ZRANGEBYSCORE', DATA_LIVE, '-inf', last_data)) do drop_data(k) end
local next_data, data_next
next_data, data_next, data_floor = numbers('next_data', 'data_next', 'data_floor')
set('next_data', math.max(next_data, last_data + 1), 'data_next', math.max(data_next, last_data + 1),
  'data_floor', math.max(data_floor, last_data + 1))

for _, s in ipairs(redis.call('ZRANGE', CLAIMS, 0, -1)) do
  local other = false
  for _, g in ipairs(ids(redis.call('HGET', claim_key(s), 'groups'))) do
    other = other or foreign(redis.call('HGET', group_key(g), 'revisions'))
  end
  if other then
    take_apart(s, 'reward')
    break
  end
end

local unpublished = 0
claimed_step = numbers('claimed_step')
for _, s in ipairs(redis.call('ZRANGE', CLAIMS, 0, -1)) do
  redis.call('HSET', claim_key(s), 'published', 0)
  unpublished = unpublished + #ids(redis.call('HGET', claim_key(s), 'groups'))
end
set('unpublished', unpublished, 'claimed_step', math.max(claimed_step, step), 'version', step)

for _, g in ipairs(redis.call('ZRANGEBYSCORE', READY, '(' .. step, '+inf')) do cut_off(g) end
for _, g in ipairs(redis.call('ZRANGE', LEASES, 0, -1)) do
  if tonumber(redis.call('HGET', group_key(g), 'granted')) > step then cut_off(g) end
end
return {'ok', epoch}
