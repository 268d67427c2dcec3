-- settling: the end of claims. A part, not a script; needs groups, data and steps before it.

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
