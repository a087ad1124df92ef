-- The extraction stage: what does a request ask for, and what did its answer use?
--
-- Strict: a body that two parsers could read differently is refused. The bytes themselves pass through unchanged.
-- If anything here fails, "resolved" is not set, and what is not resolved is denied.
-- Names the resource that extract.go says the route has; extract.go says too what is left where. caller.lua stands before it.

local ffi = require("ffi")
local lower = string.lower

local DEEPEST = 64        -- nesting of JSON
local LONGEST_NAME = 256  -- bytes
local MOST_STEPS = 400000 -- keys, values, commas and brackets of a body: a worker reads so many in tens of milliseconds
local LONGEST_USAGE = 512 -- bytes behind the key that are put together from pieces

-- What a byte is inside a JSON string: 0 plain, 1 the closing quote, 2 a backslash, 3 a control character, 4 UTF-8.
local kind = ffi.new("uint8_t[256]")
for i = 0, 31 do kind[i] = 3 end
for i = 128, 255 do kind[i] = 4 end
kind[34], kind[92] = 1, 2
local simple = ffi.new("uint8_t[256]") -- the escapes of one letter
for _, c in ipairs({ byte('"\\/bfnrt', 1, -1) }) do simple[c] = 1 end

-- What may follow the first byte of a UTF-8 sequence (RFC 3629, section 4): its length and the range of the second byte.
local function utf8_at(p, i, n)
  local a = p[i]
  local length, low, high = 0, 0x80, 0xBF
  if a >= 0xC2 and a <= 0xDF then length = 2
  elseif a >= 0xE0 and a <= 0xEF then
    length = 3
    if a == 0xE0 then low = 0xA0 elseif a == 0xED then high = 0x9F end
  elseif a >= 0xF0 and a <= 0xF4 then
    length = 4
    if a == 0xF0 then low = 0x90 elseif a == 0xF4 then high = 0x8F end
  end
  if length == 0 or i + length > n or p[i + 1] < low or p[i + 1] > high then return 0 end
  for k = i + 2, i + length - 1 do
    if p[k] < 0x80 or p[k] > 0xBF then return 0 end
  end
  return length
end

-- Skips a string whose first byte after the quote is at s[i] (counted from 1). Returns the place behind the closing
-- quote and whether there was an escape, or nil and what is wrong.
local function skip_string(s, p, i, n)
  local _, quick = find(s, '^[%w_%-%./: ]*"', i)
  if quick then return quick + 1, false end
  local escaped = false
  local k = i - 1 -- counted from 0 from here on
  while k < n do
    local what = kind[p[k]]
    if what == 0 then
      k = k + 1
    elseif what == 1 then
      return k + 2, escaped
    elseif what == 4 then
      local length = utf8_at(p, k, n)
      if length == 0 then return nil, "text that is not UTF-8" end
      k = k + length
    elseif what == 3 then
      return nil, "a control character in a string"
    else
      escaped = true
      if k + 1 < n and simple[p[k + 1]] == 1 then
        k = k + 2
      else
        local hex = match(s, "^u(%x%x%x%x)", k + 2)
        if not hex then return nil, "an unknown escape" end
        k = k + 6
        local unit = tonumber(hex, 16)
        if unit >= 0xD800 and unit <= 0xDBFF then
          local second = match(s, "^\\u([dD][c-fC-F]%x%x)", k + 1)
          if not second then return nil, "half of a surrogate pair" end
          k = k + 6
        elseif unit >= 0xDC00 and unit <= 0xDFFF then
          return nil, "half of a surrogate pair"
        end
      end
    end
  end
  return nil, "a string without an end"
end

-- Skips a number (RFC 8259, section 6) at s[i]. Returns the place behind it or nil.
local function skip_number(s, i)
  local _, e = find(s, "^%-?[1-9]%d*", i)
  if not e then _, e = find(s, "^%-?0", i) end
  if not e then return nil end
  local _, f = find(s, "^%.%d+", e + 1)
  e = f or e
  local _, g = find(s, "^[eE][+-]?%d+", e + 1)
  return (g or e) + 1
end

local literals = { [116] = "true", [102] = "false", [110] = "null" }

-- Returns the place of the first byte at or behind i that is not white space, or nil.
local function past_space(s, i)
  local c = byte(s, i)
  if not c or c > 32 then return c and i end
  return (find(s, "[^ \t\r\n]", i))
end

-- What may come next.
local VALUE, FIRST_VALUE, KEY, FIRST_KEY, NEXT, NOTHING = 1, 2, 3, 4, 5, 6

-- Returns the string at the key `want` of the object that s is, or nil and what is wrong with s.
local function read_object(s, want)
  local n = #s
  local p = ffi.cast("const uint8_t*", s)
  local inside = {}  -- by depth: is it an object?
  local depth, expect, found = 0, VALUE, nil
  local i = past_space(s, 1)
  if not i then return nil, "no body" end
  if byte(s, i) ~= 123 then return nil, "a body that is not a JSON object" end
  local steps = 0
  while i do
    steps = steps + 1
    if steps > MOST_STEPS then return nil, "too many values" end
    local c = byte(s, i)
    if expect == NOTHING then return nil, "bytes behind the end of the JSON object" end
    if expect == KEY or expect == FIRST_KEY then
      if c == 34 then
        local after, escaped = skip_string(s, p, i + 1, n)
        if not after then return nil, escaped end
        local colon = past_space(s, after)
        if not colon or byte(s, colon) ~= 58 then return nil, "a key without a value" end
        local value = past_space(s, colon + 1)
        if depth == 1 then
          if escaped then return nil, "an escape in a key" end
          local key = after - i - 2 == #want and sub(s, i + 1, after - 2) -- no copy of what can't be it
          if key and lower(key) == want then
            if found then return nil, 'more than one "' .. want .. '"' end
            if key ~= want then return nil, '"' .. key .. '" in place of "' .. want .. '"' end
            if not value or byte(s, value) ~= 34 then return nil, '"' .. want .. '" that is not a string' end
            local stop, escapes = skip_string(s, p, value + 1, n)
            if not stop then return nil, escapes end
            if escapes then return nil, 'an escape in "' .. want .. '"' end
            found = sub(s, value + 1, stop - 2)
          end
        end
        i, expect = value, VALUE
      elseif c == 125 and expect == FIRST_KEY then
        depth = depth - 1
        i, expect = past_space(s, i + 1), depth == 0 and NOTHING or NEXT
      else
        return nil, "something that is not a key"
      end
    elseif expect == NEXT then
      local object = inside[depth]
      if c == 44 then
        expect = object and KEY or VALUE
      elseif c == (object and 125 or 93) then
        depth = depth - 1
        if depth == 0 then expect = NOTHING end
      else
        return nil, "something between two values"
      end
      i = past_space(s, i + 1)
    elseif c == 123 or c == 91 then
      depth = depth + 1
      if depth > DEEPEST then return nil, "nesting that is too deep" end
      inside[depth] = c == 123
      i, expect = past_space(s, i + 1), c == 123 and FIRST_KEY or FIRST_VALUE
    elseif c == 93 and expect == FIRST_VALUE then
      depth = depth - 1
      i, expect = past_space(s, i + 1), NEXT
    else
      local after, why
      if c == 34 then
        after, why = skip_string(s, p, i + 1, n)
      elseif literals[c] then
        local word = literals[c]
        if sub(s, i, i + #word - 1) == word then after = i + #word end
      else
        after = skip_number(s, i)
      end
      if not after then return nil, why or "something that is not JSON" end
      i, expect = past_space(s, after), NEXT
    end
  end
  if expect ~= NOTHING then return nil, "JSON that ends too early" end
  if not found then return nil, 'no "' .. want .. '"' end
  return found
end

-- Returns the segment of the path, or nil. Names never need an escape, so none is accepted.
local function read_path(path, number, rest)
  path = match(path, "^[^?#]*")
  for _ = 1, number do
    path = match(path, "^[^/]*/(.*)$")
    if not path then return nil end
  end
  if rest then return match(path, "^[%w._:/@-]+$") end
  return match(match(path, "^[^/]*"), "^[%w._-]+$")
end

local UUID = "^" .. ("%x"):rep(8):gsub("%%x", "[0-9a-f]") .. ("%-" .. ("[0-9a-f]"):rep(4)):rep(3) .. "%-" .. ("[0-9a-f]"):rep(12) .. "$"

function envoy_on_request(handle)
  local wants = handle:filterContext()
  local from = wants:get("from")
  if not from then return end -- in no table: denied, because nothing is resolved
  local ends, _
  if wants:get("told") then
    local known = handle:streamInfo():dynamicMetadata():get(SPACE)
    ends = known and known.ends
  else
    _, ends = certified(handle:streamInfo():downstreamSslConnection())
  end
  if not ends then return end

  local name
  if from == "body" then
    -- A backend that decodes the body first reads another one, perhaps one that is JSON both ways.
    local headers = handle:headers()
    if headers:get("content-encoding") then return refuse(handle, 400, "an encoding") end
    local charset = lower(headers:get("content-type") or "")
    if find(charset, "charset", 1, true) and find(gsub(charset, 'charset="?utf%-8"?', ""), "charset", 1, true) then
      return refuse(handle, 400, "another charset than UTF-8")
    end
    local key = wants:get("key")
    local body, why = handle:body(), "no body" -- the script may rest here: whatever it holds of Envoy is void behind it
    if body then name, why = read_object(body:getBytes(0, body:length()), key) end
    if not name then return refuse(handle, 400, why) end
    if #name == 0 or #name > LONGEST_NAME or find(name, "%c") or not is_plain("/" .. name) then
      return refuse(handle, 400, "a name that no resource has")
    end
  elseif from ~= "nothing" then
    name = read_path(handle:headers():get(":path"), wants:get("segment"), wants:get("rest"))
    if not name or (from == "id" and not find(name, UUID)) then return end -- no resource is called like this: denied
  end

  -- What begins on a certificate ends with it.
  local ms = ends * 1000 - handle:timestamp()
  if ms <= 0 then return refuse(handle, 401, "come with a certificate that has expired since") end
  handle:headers():replace("x-envoy-upstream-rq-timeout-ms", format("%d", ms))

  local found = handle:streamInfo():dynamicMetadata()
  if from == "id" then
    found:set(SPACE, "id", name)
    return
  end
  if name then found:set(SPACE, "name", name) end
  found:set(SPACE, "resolved", "=")
end

-- Returns the number at a key, written with its quotes, behind text[i], or nil. (To search for the key and only then
-- match is six times as fast as a pattern for both.)
local function number_at(text, key, i)
  local _, e = find(text, key, i, true)
  return e and tonumber(match(text, "^%s*:%s*(%d+)", e + 1))
end

-- Usage stands at the end of an answer: in the only JSON object, or in the last events of a stream. The network may
-- cut it in pieces anywhere.
function envoy_on_response(handle)
  if handle:filterContext():get("key") ~= "model" then return end -- nothing else uses tokens
  local last, from  -- the newest text with the key in it, and where the key ends
  local tail = ""   -- the end of the chunk before, if the key may begin there
  for chunk in handle:bodyChunks() do
    local n = chunk:length()
    if n > 0 then
      local bytes = chunk:getBytes(0, n)
      local text = tail .. bytes
      local _, e = find(text, '"usage"', 1, true)
      if e then last, from = text, e
      elseif last and #last - from < LONGEST_USAGE then last = last .. bytes end
      tail = match(sub(text, -6), '"u?s?a?g?e?$') or ""
    end
  end
  if not last then return end
  local input, output = number_at(last, '"prompt_tokens"', from), number_at(last, '"completion_tokens"', from)
  if input then
    local found = handle:streamInfo():dynamicMetadata()
    found:set(SPACE, "input_tokens", input)
    found:set(SPACE, "output_tokens", output or 0)
  end
end
