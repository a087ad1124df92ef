-- Stands in for the extraction stage.
local SPACE = "sallyport"

function envoy_on_request(handle)
  local headers, found = handle:headers(), handle:streamInfo():dynamicMetadata()
  found:set(SPACE, "caller", headers:get("x-caller") or "")
  found:set(SPACE, "max_output", tonumber(headers:get("x-max") or 0))
  found:set(SPACE, "answers", tonumber(headers:get("x-answers") or 1))
end

-- Counts the events of a stream (HTML, 9.2.6), and finds the smallest of them.
function envoy_on_response(handle)
  local function set(key, value) handle:streamInfo():dynamicMetadata():set(SPACE, key, value) end -- it is void after each chunk
  local stream = string.find(handle:headers():get("content-type") or "", "^text/event%-stream")
  local events, smallest, since, broken = 0, nil, 0, false
  local tail = ""
  for chunk in handle:bodyChunks() do
    local text = chunk:getBytes(0, chunk:length())
    local input, output = string.match(text, '"prompt_tokens":(%d+),"completion_tokens":(%d+)')
    if input then
      set("input_tokens", tonumber(input))
      set("output_tokens", tonumber(output))
    end
    if stream then
      local i = 1
      if broken and string.byte(text, 1) == 10 then -- the end of an event is cut in two
        since = since + 1
        events, smallest, since, i = events + 1, math.min(smallest or since, since), 0, 2
      end
      while true do
        local _, e = string.find(text, "\n\n", i, true)
        if not e then break end
        since = since + e - i + 1
        events, smallest, since, i = events + 1, math.min(smallest or since, since), 0, e + 1
      end
      since = since + #text - i + 1
      broken = since > 0 and string.byte(text, #text) == 10
      set("events", events)
      set("smallest_event", smallest or 0)
    end
  end
end
