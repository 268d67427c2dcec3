-- fail: the holder could not make the group.
-- Uses: groups.
-- ARGV: group, token, reason, prompt ('' = not told).
-- Effect: one attempt is spent; the group waits for the next asker, or is dead with the reasons of all attempts kept.
-- Idempotent: the token is revoked, so a repeat answers 'lost' and changes nothing.
-- Reply: {'pool'} | {'dead'} | {'lost'}
local g, token, reason, prompt = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('HGET', TOKENS, token) ~= g then return {'lost'} end
add('failed', 1)
if prompt ~= '' then redis.call('HSET', group_key(g), 'prompt', prompt) end
return {spend(g, reason, true)}
