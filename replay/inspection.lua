-- inspection: all that a person may want to see of a run's ledger, in one consistent look.
-- KEYS[1] = "ddrl:{run}:"; see lua/common.lua for the keys below it and lua/groups.lua for the records.
-- ARGV: none. Effect: none. Idempotent: read only.
-- Reply: {'ok', now (ms of Redis TIME), meta, {group, record, …} of live groups, {group, deadline, …} of leases,
--         waiting groups, ready groups, {step, record, {group, record, …}, …} of claims, {batch, record, …} of unclaimed
--         data, {batch, deadline, …} of data leases, ready batches, requeued groups, {group, reasons, …} of the dead,
--         {settled, evicted, dead} bitmaps} | {'uninitialised'}; a record is {field, value, …}.
local P = KEYS[1]
if redis.call('HEXISTS', P .. 'meta', 'slots') == 0 then return {'uninitialised'} end

local function records(kind, ids)
  local found = {}
  for _, id in ipairs(ids) do
    found[#found + 1] = id
    found[#found + 1] = redis.call('HGETALL', P .. kind .. ':' .. id)
  end
  return found
end

local function members(set) return redis.call('ZRANGE', P .. set, 0, -1) end
local function scored(set) return redis.call('ZRANGE', P .. set, 0, -1, 'WITHSCORES') end

local claims = {}
for _, step in ipairs(members('claims')) do
  local groups = {}
  for g in string.gmatch(redis.call('HGET', P .. 'claim:' .. step, 'groups') or '', '%d+') do groups[#groups + 1] = g end
  claims[#claims + 1] = step
  claims[#claims + 1] = redis.call('HGETALL', P .. 'claim:' .. step)
  claims[#claims + 1] = records('group', groups)
end

local bitmaps = {}
for i, name in ipairs({'settled', 'evicted', 'dead'}) do bitmaps[i] = redis.call('GET', P .. name) or '' end
local time = redis.call('TIME')
return {
  'ok', time[1] * 1000 + math.floor(time[2] / 1000), redis.call('HGETALL', P .. 'meta'), records('group', members('live')),
  scored('leases'), members('pool'), members('ready'), claims, records('data', members('data_live')), scored('data_leases'),
  members('data_ready'), members('requeued'), redis.call('HGETALL', P .. 'letters'), bitmaps}
