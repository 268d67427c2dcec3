-- commit: a finished group becomes ready. The payload has been written before this script runs.
-- ARGV: group, token, version, lineage ('' = the epoch of the lease), bytes, header (opaque JSON), ref,
--       payload key ('' when the payload is outside Redis).
-- Effect: leased -> ready; the payload loses its expiry. Weights of a cut-off lineage evict the group instead.
-- Idempotent: the same token again answers 'ok' and changes nothing; any other token answers 'lost'.
-- Reply: {'ok'} | {'lost'} | {'no_payload'}
--        | {'budget', group bytes, data bytes, retained groups, retained data, limit}
local g, token, version, lineage = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local bytes, header, ref, payload = tonumber(ARGV[5]), ARGV[6], ARGV[7], ARGV[8]
local record = group_key(g)
local held = redis.call('HMGET', record, 'token', 'ref', 'epoch')
if held[1] ~= token then return {'lost'} end
if payload ~= '' and redis.call('STRLEN', payload) ~= bytes then return {'no_payload'} end
if held[2] then
  if payload ~= '' then redis.call('PERSIST', payload) end
  return {'ok'}
end
if not version_alive(tonumber(lineage) or tonumber(held[3]), version) then
  cut_off(g)
  return {'lost'}
end

local sum, count, data_sum, data_count, retained, data_retained, max_bytes = numbers(
  'group_bytes_sum', 'group_commits', 'data_bytes_sum', 'data_commits', 'retained', 'data_retained', 'max_bytes')
local mean = (sum + bytes) / (count + 1)
local data_mean = data_sum / math.max(1, data_count)
if mean * retained + data_mean * data_retained > max_bytes then
  return {'budget', math.ceil(mean), math.ceil(data_mean), retained, data_retained, max_bytes}
end

if payload ~= '' then redis.call('PERSIST', payload) end
redis.call('HSET', record, 'ref', ref, 'bytes', bytes, 'version', version, 'header', header)
redis.call('HDEL', TOKENS, token)
redis.call('ZREM', LEASES, g)
redis.call('ZREM', POOL, g)
redis.call('ZADD', READY, version, g)
add('bytes', bytes)
add('group_bytes_sum', bytes)
add('group_commits', 1)
if bytes > numbers('largest_group') then set('largest_group', bytes) end
return {'ok'}
