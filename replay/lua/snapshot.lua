-- snapshot: everything the audit and the sweep need, in one consistent look.
-- Uses: data, steps.
-- ARGV: none. Effect: none. Idempotent: read only.
-- Reply: {'ok', meta, {live, ready, leases, pool, requeued, data_live}, {settled, evicted, dead (bitmaps)},
--         {step, groups, data, …}, {group, bytes, ref, revisions, …}, {data batch, bytes, ref, '', …}, trash}; bytes,
--         ref and revisions are '' for groups and batches without a payload.
local sets, bitmaps, claims, groups, batches = {}, {}, {}, {}, {}
for i, name in ipairs({'live', 'ready', 'leases', 'pool', 'requeued', 'data_live'}) do
  sets[i] = redis.call('ZRANGE', P .. name, 0, -1)
end
for i, name in ipairs({'settled', 'evicted', 'dead'}) do bitmaps[i] = redis.call('GET', P .. name) or '' end

local function describe(reply, id, record)
  local held = redis.call('HMGET', record, 'bytes', 'ref', 'revisions')
  reply[#reply + 1] = id
  reply[#reply + 1] = held[1] or ''
  reply[#reply + 1] = held[2] or ''
  reply[#reply + 1] = held[3] or ''
end
for _, g in ipairs(sets[1]) do describe(groups, g, group_key(g)) end
for _, k in ipairs(sets[6]) do describe(batches, k, data_key(k)) end
for _, step in ipairs(redis.call('ZRANGE', CLAIMS, 0, -1)) do
  local held = redis.call('HMGET', claim_key(step), 'groups', 'data')
  claims[#claims + 1] = step
  claims[#claims + 1] = held[1]
  claims[#claims + 1] = held[2]
  for _, g in ipairs(ids(held[1])) do describe(groups, g, group_key(g)) end
  for _, k in ipairs(ids(held[2])) do describe(batches, k, data_key(k)) end
end
return {'ok', redis.call('HGETALL', META), sets, bitmaps, claims, groups, batches, redis.call('SMEMBERS', TRASH)}
