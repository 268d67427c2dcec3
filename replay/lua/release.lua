-- release: an owner that restarted gives back what its former self held, without waiting for the expiry.
-- Uses: groups, data.
-- ARGV: owner.
-- Effect: its group leases spend an attempt, its data leases are free at once.
-- Idempotent: a repeat finds nothing.
-- Reply: {'ok', groups released, data batches released}
local owner, groups, data = ARGV[1], 0, 0
for _, g in ipairs(redis.call('ZRANGE', LEASES, 0, -1)) do
  if redis.call('HGET', group_key(g), 'owner') == owner then
    spend(g, 'released by ' .. owner, true)
    groups = groups + 1
  end
end
for _, k in ipairs(redis.call('ZRANGEBYSCORE', DATA_LEASES, '(0', '+inf')) do
  if redis.call('HGET', data_key(k), 'owner') == owner then
    redis.call('ZADD', DATA_LEASES, 0, k)
    data = data + 1
  end
end
return {'ok', groups, data}
