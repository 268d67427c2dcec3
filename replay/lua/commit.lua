-- commit: a finished group becomes ready. The payload has been written before this script runs.
-- Uses: groups, payload.
-- ARGV: group, token, version, lineage ('' = the epoch of the lease), bytes, header (opaque JSON), ref,
--       flat ('1' = the rewards all agree), revisions of the rewards, then the parts of the payload (see payload.lua).
-- Effect: leased -> ready; every part of the payload loses its expiry. Weights of a cut-off lineage evict the group instead, and rewards
--         or revisions that the run does not expect; so does a flat group while the run drops those and fewer than
--         drop_limit were dropped since the last new claim.
-- Idempotent: the same token again answers as before and changes nothing, until the group ends ('dropped': until the
--             next new claim); any other token answers 'lost'. 'full' and 'no_payload' change nothing: ask again.
-- Reply: {'ok'} | {'dropped'} | {'lost'} | {'no_payload'} | {'full', bytes held, groups held, limit}
--        | {'budget', group bytes, data bytes, retained groups, retained data, limit}
local g, token, version, lineage = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local bytes, header, ref, flat, revisions, parts = tonumber(ARGV[5]), ARGV[6], ARGV[7], ARGV[8] == '1', ARGV[9], 10
local record, dropped = group_key(g), P .. 'dropped'
local held = redis.call('HMGET', record, 'token', 'ref', 'epoch')
if held[1] ~= token then
  if flat and redis.call('SISMEMBER', dropped, token) == 1 then return {'dropped'} end
  return {'lost'}
end
if not arrived(parts) then return {'no_payload'} end
if held[2] then
  adopt(parts)
  return {'ok'}
end
if not version_alive(tonumber(lineage) or tonumber(held[3]), version) then
  cut_off(g)
  return {'lost'}
end
if foreign(revisions) then
  evict(g, 'reward')
  local found = revisions == '' and 'no named rewards' or revisions
  local expected = redis.call('HGET', META, 'revisions')
  set('last_failure', 'group ' .. g .. ' was scored by ' .. found .. ', the run expects ' .. expected)
  return {'lost'}
end

local total, sum, count, data_sum, data_count, retained, data_retained, max_bytes, largest, claimed, drop_limit = numbers(
  'bytes', 'group_bytes_sum', 'group_commits', 'data_bytes_sum', 'data_commits', 'retained', 'data_retained', 'max_bytes',
  'largest_group', 'claimed', 'drop_limit')
if flat and redis.call('SCARD', dropped) < drop_limit then
  evict(g, 'zero_variance')
  redis.call('SADD', dropped, token)
  return {'dropped'}
end
local mean = (sum + bytes) / (count + 1)
local data_mean = data_sum / math.max(1, data_count)
if mean * retained + data_mean * data_retained > max_bytes then
  return {'budget', math.ceil(mean), math.ceil(data_mean), retained, data_retained, max_bytes}
end
if bytes > max_bytes then return {'budget', bytes, 0, 1, 0, max_bytes} end
if total + bytes > max_bytes then return {'full', total, redis.call('ZCARD', READY) + claimed, max_bytes} end

adopt(parts)
redis.call('HSET', record, 'ref', ref, 'bytes', bytes, 'version', version, 'header', header,
  'revisions', revisions, 'ready_at', now_ms())
redis.call('HDEL', TOKENS, token)
if redis.call('ZREM', LEASES, g) == 0 then redis.call('ZREM', POOL, g) end
redis.call('ZADD', READY, version, g)
set('bytes', total + bytes, 'group_bytes_sum', sum + bytes, 'group_commits', count + 1,
  'largest_group', math.max(bytes, largest))
return {'ok'}
