-- data: the anchor-data batches. A part, not a script.
-- Record data:<k>: token, owner; once committed also ref, bytes, checksum.
local DATA_LIVE, DATA_READY, DATA_LEASES = P .. 'data_live', P .. 'data_ready', P .. 'data_leases'
local function data_key(k) return P .. 'data:' .. k end

local function drop_data(k)
  local held = redis.call('HMGET', data_key(k), 'bytes', 'ref', 'token')
  if held[2] then
    add('bytes', -held[1])
    redis.call('SADD', TRASH, held[2])
  elseif held[3] then
    redis.call('HDEL', TOKENS, held[3])
  end
  for _, name in ipairs({DATA_LIVE, DATA_READY, DATA_LEASES}) do redis.call('ZREM', name, k) end
  redis.call('DEL', data_key(k))
end
