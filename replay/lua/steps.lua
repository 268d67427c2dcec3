-- steps: what the learner's calls share. A part, not a script.
-- Record claim:<step>: groups, data (space-separated indices), published (0 or 1), claimed_at.
local CLAIMS = P .. 'claims'
local function claim_key(step) return P .. 'claim:' .. step end

local function ids(text)
  local out = {}
  for id in string.gmatch(text or '', '%d+') do out[#out + 1] = tonumber(id) end
  return out
end

-- A server at its maxmemory refuses a script whose first write may allocate, and would so refuse the very calls that
-- free memory. A deletion may always run, and after one write the script runs to its end.
local function run_even_when_full() redis.call('DEL', P .. 'full') end

-- A learner of an older epoch must not move the ledger.
local function fenced(epoch)
  local current = numbers('epoch')
  if tonumber(epoch) == current then return nil end
  return {'fenced', current}
end
