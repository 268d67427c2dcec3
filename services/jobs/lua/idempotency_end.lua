-- ARGV: name, fingerprint, ttl ms, body, media type; ttl 0 forgets the key, a body keeps the answer, no body renews the lease
local key = p .. ARGV[1]
if redis.call('HGET', key, 'fingerprint') ~= ARGV[2] or redis.call('HEXISTS', key, 'body') == 1 then return 0 end
if ARGV[3] == '0' then return redis.call('DEL', key) end
if ARGV[5] ~= '' then redis.call('HSET', key, 'body', ARGV[4], 'media_type', ARGV[5]) end
return redis.call('PEXPIRE', key, ARGV[3])
