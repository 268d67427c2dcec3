-- ARGV: name, fingerprint, lease ms → {'new'} | {'running'} | {'mismatch'} | {'kept', body, media type}
local key = p .. ARGV[1]
local found = redis.call('HMGET', key, 'fingerprint', 'body', 'media_type')
if not found[1] then
  redis.call('HSET', key, 'fingerprint', ARGV[2])
  redis.call('PEXPIRE', key, ARGV[3])
  return {'new'}
end
if found[1] ~= ARGV[2] then return {'mismatch'} end
if not found[2] then return {'running'} end
return {'kept', found[2], found[3]}
