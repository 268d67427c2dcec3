-- close: the ledger of this run is about to be deleted; every other call answers 'uninitialised' from now on.
-- Uses: nothing more.
-- ARGV: force ('1' = also while leases are alive).
-- Effect: removes the limits that all scripts look for first; the keys are deleted by the client afterwards.
-- Idempotent: a repeat answers 'uninitialised'.
-- Reply: {'ok'} | {'leases', groups, data batches}
if ARGV[1] ~= '1' then
  local now = now_ms()
  local groups = redis.call('ZCOUNT', LEASES, '(' .. now, '+inf')
  local data = redis.call('ZCOUNT', P .. 'data_leases', '(' .. now, '+inf')
  if groups + data > 0 then return {'leases', groups, data} end
end
redis.call('HDEL', META, 'slots')
set('closed', 1)
return {'ok'}
