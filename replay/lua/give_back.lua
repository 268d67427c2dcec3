-- give_back: the holder could not work for want of something that is not the group's fault.
-- Uses: groups.
-- ARGV: group, token, reason.
-- Effect: the group waits for the next asker; no attempt is spent. Its owner gets it again after a pause at the earliest,
--         so that one who cannot work asks without haste; anyone else at once.
-- Idempotent: the token is revoked, so a repeat answers 'lost' and changes nothing.
-- Reply: {'pool'} | {'lost'}
local g, token, reason = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', TOKENS, token) ~= g then return {'lost'} end
add('given_back', 1)
set('last_failure', 'group ' .. g .. ' was given back: ' .. reason)
to_pool(g, true)
redis.call('HSET', group_key(g), 'rests', now_ms() + numbers('pause_ms'))
return {'pool'}
