-- fail: the holder could not make the group.
-- Uses: groups.
-- ARGV: group, token, reason.
-- Effect: one attempt is spent; the group waits for the next asker, or is dead with the reasons of all attempts kept.
-- Idempotent: the token is revoked, so a repeat answers 'lost' and changes nothing.
-- Reply: {'pool'} | {'dead'} | {'lost'}
local g, token, reason = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', TOKENS, token) ~= g then return {'lost'} end
add('failed', 1)
return {spend(g, reason, true)}
