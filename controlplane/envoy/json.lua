-- Names in the JSON object of a body (RFC 8259).

local DEEPEST = 64 -- nesting

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
-- quote, whether there was an escape, and whether there was anything but plain ASCII; or nil and what is wrong.
local function skip_string(s, p, i, n)
  local _, quick = find(s, '^[%w_%-%./: ]*"', i)
  if quick then return quick + 1, false, false end
  local escaped = false
  local k = i - 1 -- counted from 0 from here on
  while k < n do
    local what = kind[p[k]]
    if what == 0 then
      k = k + 1
    elseif what == 1 then
      return k + 2, escaped, true
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

-- What a route says of keys: name=model own=dbName also=file_id also3=model same1=model most1=max_tokens, where a number is the one depth
-- at which they count.
local keys_of = memo(function(text)
  local keys = { any = {}, at = {}, maybe = {} }
  for what, depth, list in gmatch(text, "(%l+)(%d*)=(%S+)") do
    local into = keys.any
    if what == "name" or what == "own" then depth = 1 end
    if depth ~= "" then
      depth = tonumber(depth)
      keys.at[depth] = keys.at[depth] or {}
      into = keys.at[depth]
    end
    local first = true
    for key in gmatch(list, "[^,]+") do
      into[lower(key)], first = into[lower(key)] or { what = what, key = key, first = first }, false
      keys.maybe[#key * 256 + bor(byte(key), 32)] = true
    end
    if what == "name" then keys.name = list end
  end
  return keys
end)

-- The key as decoders find it that don't look at letter case: those of Go take even "\u017f" for an s and the sign of kelvins
-- for a k.
local function folded(key)
  key = gsub(key, "\\u(%x%x%x%x)", function(hex)
    local c = tonumber(hex, 16)
    if c < 128 then return char(c) end
    return c == 0x17F and "s" or c == 0x212A and "k" or nil
  end)
  return lower(gsub(gsub(key, "\197\191", "s"), "\226\132\170", "k"))
end

-- What a request says of the length of its answers: `most` is the largest of all that it says, `stated` is whether the
-- backend is bound by it, `answers` is how many it asks for, `odd` is whether some reader could understand all that otherwise.
local LARGEST = 2 ^ 50
local bounds = { most = true, more = true, times = true, each = true }

-- Takes down what stands at s[i], behind a key that says something of it, at that depth.
local function take(asked, known, key, s, i, depth)
  local what = known.what
  if what == "each" then -- one answer, or more, for each element of a list; not if it is one of tokens, nor one of messages
    local first = match(s, "^%[%s*([%[{\"])", i)
    if first and (first ~= "{" or known.key == "prompt") then asked.list, asked.elements = depth + 1, 1 end
    return
  end
  if find(s, "^null", i) then return end
  local n = match(s, "^(%d+)%s*[,}]", i)
  n = n and math.min(tonumber(n), LARGEST)
  if not n or n < 1 then
    asked.odd = true
  elseif what == "times" then
    asked.answers = math.min(asked.answers * n, LARGEST)
  else
    asked.most = math.max(asked.most or 0, n)
    asked.stated = asked.stated or what == "most" and key == known.key
  end
end

-- Says it to whoever counts tokens.
local function tell(asked, handle)
  local found = handle:streamInfo():dynamicMetadata()
  if asked.stated and not asked.odd then found:set(SPACE, "max_output", asked.most) end
  if asked.answers > 1 then found:set(SPACE, "answers", asked.answers) end
end

-- Returns the string at s[i], or nil and what is wrong with it.
local function read_string(s, p, i, n, key)
  if not i or byte(s, i) ~= 34 then return nil, '"' .. key .. '" that is not a string' end
  local stop, escapes = skip_string(s, p, i + 1, n)
  if not stop then return nil, escapes end
  if escapes then return nil, 'an escape in "' .. key .. '"' end
  return sub(s, i + 1, stop - 2)
end

-- Returns the string at the key that the name has in the object that s is, or the name that is known already, and what is
-- asked for besides, nil, and whether it names DATABASE; or nil, nil and what is wrong with s. A name that is there again may
-- have `before` before it. What is said of the answers goes into `asked`.
local function read_object(s, keys, name, before, asked)
  local n = #s
  local p = ffi.cast("const uint8_t*", s)
  local any, at, maybe = keys.any, keys.at, keys.maybe
  local inside = {}  -- by depth: is it an object?
  local depth, expect = 0, VALUE
  local found, same, where, beyond, owned
  local i = past_space(s, 1)
  if not i then
    if keys.name then return nil, nil, "no body" end
    return name
  end
  if byte(s, i) ~= 123 then return nil, nil, "a body that is not a JSON object" end
  local steps = 0
  while i do
    steps = steps + 1
    if steps > MOST_STEPS then return nil, nil, "too many values" end
    local c = byte(s, i)
    if expect == NOTHING then return nil, nil, "bytes behind the end of the JSON object" end
    if expect == KEY or expect == FIRST_KEY then
      if c == 34 then
        local after, escaped, odd = skip_string(s, p, i + 1, n)
        if not after then return nil, nil, escaped end
        local colon = past_space(s, after)
        if not colon or byte(s, colon) ~= 58 then return nil, nil, "a key without a value" end
        local value = past_space(s, colon + 1)
        if depth == 1 and escaped then return nil, nil, "an escape in a key" end
        if odd or maybe[(after - i - 2) * 256 + bor(p[i], 32)] then -- no copy of what can't be one of them
          local key = sub(s, i + 1, after - 2)
          local low = odd and folded(key) or lower(key)
          local known = any[low] or at[depth] and at[depth][low]
          local what = known and known.what
          if what == "also" then
            beyond = beyond or '"' .. known.key .. '" in the body'
          elseif what == "same" then
            local text = read_string(s, p, value, n, key)
            if text and before and sub(text, 1, #before) == before then text = sub(text, #before + 1) end
            if not text or same and text ~= same then beyond = beyond or 'another "' .. known.key .. '" in the body' end
            same, where = text, known.key
          elseif what == "own" then
            local text, why = read_string(s, p, value, n, key)
            if not text and find(s, "^null", value or n + 1) then text = "" end
            if not text then return nil, nil, why end
            if text ~= "" and text ~= DATABASE then return nil, nil, ANOTHER end
            if known.first then owned = text ~= "" end
          elseif bounds[what] then
            take(asked, known, key, s, value or n + 1, depth)
          elseif what then
            if found then return nil, nil, 'more than one "' .. known.key .. '"' end
            if key ~= known.key then return nil, nil, '"' .. key .. '" in place of "' .. known.key .. '"' end
            local why
            found, why = read_string(s, p, value, n, key)
            if not found then return nil, nil, why end
          end
        end
        i, expect = value, VALUE
      elseif c == 125 and expect == FIRST_KEY then
        depth = depth - 1
        i, expect = past_space(s, i + 1), depth == 0 and NOTHING or NEXT
      else
        return nil, nil, "something that is not a key"
      end
    elseif expect == NEXT then
      local object = inside[depth]
      if c == 44 then
        expect = object and KEY or VALUE
        if depth == asked.list then asked.elements = asked.elements + 1 end
      elseif c == (object and 125 or 93) then
        if depth == asked.list then
          asked.answers, asked.list = math.min(asked.answers * asked.elements, LARGEST), nil
        end
        depth = depth - 1
        if depth == 0 then expect = NOTHING end
      else
        return nil, nil, "something between two values"
      end
      i = past_space(s, i + 1)
    elseif c == 123 or c == 91 then
      depth = depth + 1
      if depth > DEEPEST then return nil, nil, "nesting that is too deep" end
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
      if not after then return nil, nil, why or "something that is not JSON" end
      i, expect = past_space(s, after), NEXT
    end
  end
  if expect ~= NOTHING then return nil, nil, "JSON that ends too early" end
  if keys.name then
    if found then
      if not is_name(found) then return nil, nil, "a name that no resource has" end
    elseif not beyond then
      return nil, nil, 'no "' .. keys.name .. '"'
    end
    name = found or ""
  end
  if same and same ~= name then beyond = beyond or 'another "' .. where .. '" in the body' end
  return name, beyond, nil, owned
end

function readers.body(handle, wants, name)
  local why = encoded(handle:headers())
  if why then return nil, nil, why end
  local keys, before = keys_of(wants:get("keys")), wants:get("before")
  local body = handle:body() -- the script may rest here
  local asked = { answers = 1 }
  local found, beyond, owned
  found, beyond, why, owned = read_object(body and body:getBytes(0, body:length()) or "", keys, name, before, asked)
  if asked.stated or asked.answers > 1 then tell(asked, handle) end
  return found, beyond, why, owned
end

