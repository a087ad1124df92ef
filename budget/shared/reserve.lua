-- Takes all charges, or none. KEYS are the accounts; ARGV is the caller's clock and by how much it may be wrong, in
-- milliseconds, and for each account: its max, the amount, how much of that is held, and when the key ends.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if math.abs(now - ARGV[1]) > tonumber(ARGV[2]) then return redis.error_reply('CLOCK ' .. now) end
local allowed, answer = 1, {}
for i, key in ipairs(KEYS) do
  local at = 4 * i - 1
  local used = tonumber(redis.call('HGET', key, 'used') or 0)
  if used + ARGV[at + 1] > tonumber(ARGV[at]) then allowed = 0 end
end
for i, key in ipairs(KEYS) do
  local at = 4 * i - 1
  if allowed == 1 then
    redis.call('HINCRBY', key, 'used', ARGV[at + 1])
    redis.call('HINCRBY', key, 'held', ARGV[at + 2])
    redis.call('HSET', key, 'max', ARGV[at])
    redis.call('PEXPIREAT', key, ARGV[at + 3])
  end
  local now = redis.call('HMGET', key, 'used', 'held')
  answer[2 * i - 1], answer[2 * i] = tonumber(now[1] or 0), tonumber(now[2] or 0)
end
return { allowed, unpack(answer) }
