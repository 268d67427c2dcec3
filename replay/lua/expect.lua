-- expect: the rewards, each at its revision, that groups must have been scored by.
-- Uses: groups, steps.
-- ARGV: revisions (as `rewards.identity` writes them; '' = whatever a group was scored by will do).
-- Effect: ready groups that were scored otherwise are evicted; `commit` refuses such groups from now on. Claims stay as
--         they are, since ranks may be training on them, until a rollback takes apart those that were scored otherwise.
-- Idempotent: a repeat finds nothing to evict.
-- Reply: {'ok', groups evicted}
run_even_when_full()
set('revisions', ARGV[1])
local evicted = 0
for _, g in ipairs(redis.call('ZRANGE', READY, 0, -1)) do
  if foreign(redis.call('HGET', group_key(g), 'revisions')) then
    evict(g, 'reward')
    evicted = evicted + 1
  end
end
return {'ok', evicted}
