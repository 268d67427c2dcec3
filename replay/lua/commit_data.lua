-- commit_data: a data batch becomes ready. Its content is a function of (seed, index), so the first commit wins.
-- Uses: data, payload.
-- ARGV: batch, bytes, checksum, ref, then the parts of the payload (see payload.lua).
-- Effect: the batch is ready; every part of the payload loses its expiry.
-- Idempotent: the same ref again answers 'ok'; another copy answers 'duplicate' and is deleted by its writer.
--             'full' and 'no_payload' change nothing: ask again.
-- Reply: {'ok'} | {'duplicate'} | {'unknown'} | {'no_payload'} | {'full', …} | {'budget', …} as commit
local k, bytes, checksum, ref, parts = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], 5
local record = data_key(k)
if tonumber(k) >= numbers('next_data') then return {'unknown'} end
local held = redis.call('HMGET', record, 'token', 'ref')
if not held[1] or (held[2] and held[2] ~= ref) then return {'duplicate'} end
if not arrived(parts) then return {'no_payload'} end
if held[2] then
  adopt(parts)
  return {'ok'}
end

local total, sum, count, data_sum, data_count, retained, data_retained, max_bytes, claimed = numbers(
  'bytes', 'group_bytes_sum', 'group_commits', 'data_bytes_sum', 'data_commits', 'retained', 'data_retained', 'max_bytes',
  'claimed')
local mean = sum / math.max(1, count)
local data_mean = (data_sum + bytes) / (data_count + 1)
if mean * retained + data_mean * data_retained > max_bytes then
  return {'budget', math.ceil(mean), math.ceil(data_mean), retained, data_retained, max_bytes}
end
if bytes > max_bytes then return {'budget', 0, bytes, 0, 1, max_bytes} end
if total + bytes > max_bytes then return {'full', total, redis.call('ZCARD', READY) + claimed, max_bytes} end

adopt(parts)
redis.call('HSET', record, 'ref', ref, 'bytes', bytes, 'checksum', checksum)
redis.call('HDEL', TOKENS, held[1])
redis.call('ZREM', DATA_LEASES, k)
redis.call('ZADD', DATA_READY, k, k)
set('bytes', total + bytes, 'data_bytes_sum', data_sum + bytes, 'data_commits', data_count + 1)
return {'ok'}
