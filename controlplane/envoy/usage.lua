-- What did an answer use? USAGE is the key that usage stands behind, and INPUTS and OUTPUTS are the keys of its numbers.

local UNFINISHED = '"' .. gsub(sub(USAGE, 2, -2), ".", "%0?") .. "$"
local LONGEST_USAGE = 2048 -- bytes behind the key that are put together from pieces

-- Returns the number at one of the keys, written with their quotes, behind text[i], or nil. (To search for the key and only
-- then match is six times as fast as a pattern for both.)
local function number_at(text, keys, i)
  for k = 1, #keys do
    local _, e = find(text, keys[k], i, true)
    local n = e and match(text, "^%s*:%s*(%d+)", e + 1)
    if n then return tonumber(n) end
  end
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

-- Usage stands in the only JSON object of an answer, or in the last events of a stream; of Anthropic's, the input is in the
-- first that has any. The network may cut it in pieces anywhere.
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
  local first, last, from, at -- texts with the key in it, and where the key ends: the oldest, and the newest
  local tail = ""             -- the end of the chunk before, if the key may begin there
  local function tell()
    local input = number_at(last, INPUTS, at) or number_at(first, INPUTS, from)
    local output = number_at(last, OUTPUTS, at) or number_at(first, OUTPUTS, from)
    if input then
      local found = handle:streamInfo():dynamicMetadata()
      found:set(SPACE, "input_tokens", input)
      found:set(SPACE, "output_tokens", output or 0)
    end
  end
  for chunk in handle:bodyChunks() do
    local n = chunk:length()
    if n > 0 then
      local bytes = chunk:getBytes(0, n)
      local text = tail .. bytes
      local _, e = find(text, USAGE, 1, true)
      if first and #first - from < LONGEST_USAGE then first = first .. bytes end
      if e then
        if not first then first, from = text, e end
        repeat
          last, at = text, e
          _, e = find(text, USAGE, e + 1, true)
        until not e
      elseif last and #last - at < LONGEST_USAGE then
        last = last .. bytes
      end
      tail = match(sub(text, 1 - #USAGE), UNFINISHED) or ""
      if counted and last then tell() end
      if stream then
        events, smallest, since, broken = events_of(bytes, events, smallest, since, broken)
        local found = handle:streamInfo():dynamicMetadata()
        found:set(SPACE, "events", events)
        found:set(SPACE, "smallest_event", smallest or 0)
      end
    end
  end
  if last then tell() end
end
