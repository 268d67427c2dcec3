-- counts: the state of the ledger, in one consistent look.
-- ARGV: none. Effect: none. Idempotent: read only.
-- Reply: {'ok', name, number, …}; leased includes groups that wait for their next attempt.
local names = {
  'settled', 'evicted', 'evicted:stale', 'evicted:lineage', 'evicted:forgotten', 'dead', 'remade', 'claimed',
  'unpublished', 'bytes', 'version', 'epoch', 'next_group', 'claimed_step', 'settled_step', 'next_data', 'data_floor'}
local reply = {'ok'}
for _, name in ipairs(names) do
  reply[#reply + 1] = name
  reply[#reply + 1] = numbers(name)
end
local leased, waiting = redis.call('ZCARD', LEASES), redis.call('ZCARD', POOL)
local more = {
  leased = leased + waiting, waiting = waiting, ready = redis.call('ZCARD', READY),
  data_ready = redis.call('ZCARD', DATA_READY), data_leased = redis.call('ZCARD', DATA_LEASES),
  trash = redis.call('SCARD', TRASH)}
for name, value in pairs(more) do
  reply[#reply + 1] = name
  reply[#reply + 1] = value
end
return reply
