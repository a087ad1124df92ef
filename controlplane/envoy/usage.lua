-- What did an answer use? USAGE is the key that usage stands behind. INPUTS and OUTPUTS are keys of its numbers, of which one
-- is there; those of MORE_INPUTS and MORE_OUTPUTS are added to them.

local UNFINISHED = '"' .. gsub(sub(USAGE, 2, -2), ".", "%0?") .. "$"
local LONGEST_USAGE = 2048 -- bytes behind the key in which the numbers are

-- Returns the number at one of the keys, or at the one that is given, written with their quotes, or nil. (To search for the key and only then match is six
-- times as fast as a pattern for both.)
local function number_at(text, keys, one)
  for k = one or 1, one or #keys do
    local _, e = find(text, keys[k], 1, true)
    local n = e and match(text, "^%s*:%s*(%d+)", e + 1)
    if n then return tonumber(n) end
  end
end

-- Returns the larger of what was found before and what stands at the keys.
local function larger(before, text, keys, more)
  local n = number_at(text, keys)
  for k = 1, #more do
    local m = number_at(text, more, k)
    if m then n = (n or 0) + m end
  end
  return n and math.max(before or 0, n) or before
end

-- Counts the events of a stream (HTML, 9.2.6), and finds the smallest of them.
local function events_of(bytes, events, smallest, since, broken)
  local function ended(size)
    events, smallest = events + 1, math.min(smallest or size, size)
  end
  local i, blank = 1, "\r?\n\r?\n"
  if broken then
    local _, e = find(bytes, "^\r?\n") -- the end of an event is cut in two
    if e then
      ended(since + e)
      since, i = 0, e + 1
    end
  end
  while true do
    local _, e = find(bytes, blank, i)
    if not e then break end
    ended(since + e - i + 1)
    since, i = 0, e + 1
  end
  since = since + #bytes - i + 1
  return events, smallest, since, since > 0 and byte(bytes, #bytes) == 10
end

-- Usage stands in the only JSON object of an answer, or in events of a stream, where its numbers only grow. The network may cut
-- it in pieces anywhere. Some answers repeat what the caller said, with keys like these: so what counts is the most that
-- stands behind any of them.
--
-- Where tokens are counted, that is said as soon as it is known, and what a stream has sent so far: whoever cuts it ends the
-- script as well.
function envoy_on_response(handle)
  if not handle:filterContext():get("usage") then return end
  local decided = handle:streamInfo():dynamicMetadata():get("envoy.filters.http.rbac")
  local rule = decided and decided.enforced_effective_policy_id
  local counted = rule and find(rule, " tokens=", 1, true)
  local stream = counted and find(lower(handle:headers():get("content-type") or ""), "^text/event%-stream")
  local events, smallest, since, broken = 0, nil, 0, false -- of a stream; the bytes since the last event; whether they end in a newline
  local input, output
  local last      -- the bytes behind the newest key
  local tail = "" -- the end of the chunk before, if the key may begin there
  local function consider(text)
    input = larger(input, text, INPUTS, MORE_INPUTS)
    output = larger(output, text, OUTPUTS, MORE_OUTPUTS)
  end
  local function tell()
    local found = handle:streamInfo():dynamicMetadata()
    found:set(SPACE, "input_tokens", input)
    found:set(SPACE, "output_tokens", output or 0)
  end
  for chunk in handle:bodyChunks() do
    local n = chunk:length()
    if n > 0 then
      local bytes = chunk:getBytes(0, n)
      local text = tail .. bytes
      if last and #last < LONGEST_USAGE then
        local next = find(text, USAGE, 1, true)
        last = last .. sub(bytes, 1, math.max(0, math.min(next and next - 1 - #tail or n, LONGEST_USAGE - #last)))
        consider(last)
      end
      local _, e = find(text, USAGE, 1, true)
      while e do
        local next, after = find(text, USAGE, e + 1, true)
        last = sub(text, e + 1, math.min(next and next - 1 or #text, e + LONGEST_USAGE))
        consider(last)
        e = after
      end
      tail = match(sub(text, 1 - #USAGE), UNFINISHED) or ""
      if counted and input then tell() end
      if stream then
        events, smallest, since, broken = events_of(bytes, events, smallest, since, broken)
        local found = handle:streamInfo():dynamicMetadata()
        found:set(SPACE, "events", events)
        found:set(SPACE, "smallest_event", smallest or 0)
      end
    end
  end
  if input then tell() end
end
