-- → {queued, running, bytes of their payloads}
expire_late(now_ms())
return {redis.call('ZCARD', p .. 'queue'), redis.call('ZCARD', p .. 'running'), tonumber(redis.call('GET', p .. 'bytes') or '0')}
