-- settle: the checkpoint of `step` is registered; nothing <= step will be asked for again.
-- Uses: groups, data, steps, settling.
-- ARGV: step, epoch ('' = not fenced; the caller holds no epoch).
-- Effect: every claim <= step is settled, its payload references go to the trash.
-- Idempotent: settled claims are gone, a repeat finds none.
-- Reply: {'ok', settled groups in all} | {'order', claimed step} | {'fenced', epoch}
local step, epoch = tonumber(ARGV[1]), ARGV[2]
local refused = epoch ~= '' and fenced(epoch)
if refused then return refused end
local claimed_step = numbers('claimed_step')
if step > claimed_step then return {'order', claimed_step} end
run_even_when_full()
settle_through(step)
return {'ok', numbers('settled')}
