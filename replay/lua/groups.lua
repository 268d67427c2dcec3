-- groups: how a group moves between its states. A part, not a script.
-- Record group:<g>: token, owner, attempt (grants so far), spent (attempts lost), failures (a reason per line), prompt,
--                   rests (given back: its owner may ask again then), granted, min_version, epoch, leased_at; once
--                   committed also ref, bytes, version, header, revisions (of its rewards), ready_at.
local DEAD, LETTERS, DEATHS = P .. 'dead_order', P .. 'letters', P .. 'deaths'

local function leave_live(g)
  for _, name in ipairs({LIVE, READY, LEASES, POOL}) do redis.call('ZREM', name, g) end
end

-- Groups reach their end: no payload, no record, one bit each. Payloads are deleted by the client, at least once: the
-- references wait in `trash` until the client confirms.
local function finish(groups, outcome)
  local records, refs, freed, ended = {}, {}, 0, 0
  for i, g in ipairs(groups) do
    records[i] = group_key(g)
    local held = redis.call('HMGET', records[i], 'bytes', 'ref', 'token')
    if held[2] then
      freed = freed + held[1]
      refs[#refs + 1] = held[2]
    elseif held[3] then
      redis.call('HDEL', TOKENS, held[3])  -- that of a committed group is gone already
    end
    ended = ended + 1 - redis.call('SETBIT', P .. outcome, g, 1)
  end
  if #records > 0 then redis.call('DEL', unpack(records)) end
  if #refs > 0 then redis.call('SADD', TRASH, unpack(refs)) end
  add('bytes', -freed)
  add(outcome, ended)
end

local function evict(g, reason)
  leave_live(g)
  finish({g}, 'evicted')
  add('evicted:' .. reason, 1)
end

-- The group waits for its next attempt; the token dies with the lease only when `revoke` is set.
local function to_pool(g, revoke)
  redis.call('ZREM', LEASES, g)
  redis.call('ZADD', POOL, g, g)
  if revoke then
    local token = redis.call('HGET', group_key(g), 'token')
    if token then redis.call('HDEL', TOKENS, token) end
    redis.call('HSET', group_key(g), 'token', '')
  end
end

-- One attempt is spent. Returns 'dead' or 'pool'. The letters of the latest 1000 dead are kept; deaths are numbered from
-- the beginning of the run, and a number is never given again.
local function spend(g, reason, revoke)
  set('last_failure', 'group ' .. g .. ': ' .. reason)
  local held = redis.call('HMGET', group_key(g), 'spent', 'failures', 'prompt')
  local spent, failures = (tonumber(held[1]) or 0) + 1, held[2] and held[2] .. '\n' .. reason or reason
  if spent < numbers('max_attempts') then
    redis.call('HSET', group_key(g), 'spent', spent, 'failures', failures)
    to_pool(g, revoke)
    return 'pool'
  end
  leave_live(g)
  finish({g}, 'dead')
  redis.call('HSET', LETTERS, g, failures)
  local number, epoch = redis.call('HINCRBY', META, 'deaths', 1), numbers('epoch')
  redis.call('HSET', DEATHS, g, number .. ' ' .. epoch .. ' ' .. now_ms() .. ' ' .. (held[3] or ''))
  if redis.call('LPUSH', DEAD, g) > 1000 then
    local oldest = redis.call('RPOP', DEAD)
    redis.call('HDEL', LETTERS, oldest)
    redis.call('HDEL', DEATHS, oldest)
  end
  return 'dead'
end

-- A group made by weights of a lineage that a rollback cut off: evicted, or made again under the same index.
local function cut_off(g)
  if numbers('remake') == 0 then return evict(g, 'lineage') end
  local held = redis.call('HMGET', group_key(g), 'bytes', 'ref')
  if held[2] then
    add('bytes', -held[1])
    redis.call('SADD', TRASH, held[2])
    redis.call('HDEL', group_key(g), 'ref', 'bytes', 'version', 'header', 'revisions', 'ready_at')
  end
  redis.call('ZREM', READY, g)
  to_pool(g, true)
  add('remade', 1)
end

-- A version is (lineage epoch, step): it is alive when no later rollback went below it.
local function version_alive(lineage, version)
  for epoch = lineage + 1, numbers('epoch') do
    local floor = redis.call('HGET', P .. 'floors', epoch)
    if floor and version > tonumber(floor) then return false end
  end
  return true
end

-- Whether a group scored by `revisions` must not be trained on: the run expects other rewards, or other revisions of them.
local function foreign(revisions)
  local expected = redis.call('HGET', META, 'revisions') or ''
  return expected ~= '' and (revisions or '') ~= expected
end
