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

-- Usage stands in the only JSON object of an answer, or in the last events of a stream; of Anthropic's, the input is in the
-- first that has any. The network may cut it in pieces anywhere.
function envoy_on_response(handle)
  if not handle:filterContext():get("usage") then return end
  local first, last, from, at -- texts with the key in it, and where the key ends: the oldest, and the newest
  local tail = ""             -- the end of the chunk before, if the key may begin there
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
    end
  end
  if not last then return end
  local input = number_at(last, INPUTS, at) or number_at(first, INPUTS, from)
  local output = number_at(last, OUTPUTS, at) or number_at(first, OUTPUTS, from)
  if input then
    local found = handle:streamInfo():dynamicMetadata()
    found:set(SPACE, "input_tokens", input)
    found:set(SPACE, "output_tokens", output or 0)
  end
end

