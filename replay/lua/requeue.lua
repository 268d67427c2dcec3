-- requeue: a dead group shall be made again under its own index.
-- Uses: nothing more.
-- ARGV: group.
-- Effect: the group is marked and stays dead; the next lease that would open a new index takes the lowest marked one
--         instead, so no budget is exceeded.
-- Idempotent: a marked group stays marked; one that has been leased again is not dead, and nothing changes.
-- Reply: {'ok'} | {'not_dead'}
local g = ARGV[1]
if redis.call('GETBIT', P .. 'dead', g) == 0 then return {'not_dead'} end
redis.call('ZADD', P .. 'requeued', g, g)
return {'ok'}
