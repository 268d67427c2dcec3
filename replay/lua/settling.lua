-- settling: the end of claims: settled, or taken apart. A part, not a script; needs groups, data and steps before it.

-- Settles every claim <= step; frees what it held.
local function settle_through(step)
  for _, s in ipairs(redis.call('ZRANGEBYSCORE', CLAIMS, '-inf', step)) do
    local record = redis.call('HMGET', claim_key(s), 'groups', 'data', 'published')
    local groups, data = ids(record[1]), ids(record[2])
    finish(groups, 'settled')
    for _, k in ipairs(data) do
      drop_data(k)
      if k >= numbers('data_floor') then set('data_floor', k + 1) end
    end
    add('claimed', -#groups)
    if record[3] ~= '1' then add('unpublished', -#groups) end
    redis.call('DEL', claim_key(s))
    redis.call('ZREM', CLAIMS, s)
  end
  if step > numbers('settled_step') then set('settled_step', step) end
end

-- Takes apart every claim >= step: the groups are evicted, the data batches ready again, the steps will be formed anew.
local function take_apart(step, reason)
  for _, s in ipairs(redis.call('ZRANGEBYSCORE', CLAIMS, step, '+inf')) do
    local record = redis.call('HMGET', claim_key(s), 'groups', 'data')
    local groups, data = ids(record[1]), ids(record[2])
    finish(groups, 'evicted')
    add('evicted:' .. reason, #groups)
    add('claimed', -#groups)
    for _, k in ipairs(data) do
      redis.call('ZADD', DATA_LIVE, k, k)
      redis.call('ZADD', DATA_READY, k, k)
    end
    add('data_next', -#data)
    redis.call('DEL', claim_key(s))
    redis.call('ZREM', CLAIMS, s)
  end
  set('claimed_step', step - 1)
end
