-- Gives back what was not used. KEYS are the account in the window of the charge, and in that of now. ARGV is what was
-- reserved, what was used, and when the second key ends, in milliseconds.
local reserved, used = tonumber(ARGV[1]), tonumber(ARGV[2])
if KEYS[1] == KEYS[2] and redis.call('EXISTS', KEYS[1]) == 1 then
  local now = redis.call('HMGET', KEYS[1], 'used', 'held')
  redis.call('HSET', KEYS[1], 'used', string.format('%d', math.max(0, (now[1] or 0) + used - reserved)),
    'held', string.format('%d', math.max(0, (now[2] or 0) - reserved)))
elseif used > reserved then
  redis.call('HINCRBY', KEYS[2], 'used', string.format('%d', used - reserved))
  redis.call('PEXPIREAT', KEYS[2], ARGV[3])
end
return 1
