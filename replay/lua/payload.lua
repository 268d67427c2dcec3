-- payload: the parts of a payload that lie beside the ledger. A part, not a script.
-- A script's last arguments, from `first` on, are the key and the size of every part; none when they lie outside Redis.

-- Whether every part is there, whole.
local function arrived(first)
  for i = first, #ARGV, 2 do
    if redis.call('STRLEN', ARGV[i]) ~= tonumber(ARGV[i + 1]) then return false end
  end
  return true
end

-- What the ledger adopts does not expire.
local function adopt(first)
  for i = first, #ARGV, 2 do redis.call('PERSIST', ARGV[i]) end
end
