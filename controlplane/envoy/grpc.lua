-- Names in a message of gRPC: exactly one, uncompressed. It is walked along the fields that the route names and no further;
-- for these there is one reading, or the request is refused. (A decoder takes the last of several, takes one of another wire
-- type for an unknown field, and merges messages that are there twice.)

local DEEPEST_MESSAGE = 64

-- What a route says: name=1 same=2.1 other=14,2.1*.8 own=2. A tree of nodes, by the number of a field: what it is, and
-- the node of the message in it.
local fields_of = memo(function(text)
  local root = {}
  local function at(node, number)
    node[number] = node[number] or {}
    return node[number]
  end
  for what, places in gmatch(text, "(%l+)=(%S+)") do
    local first = true
    for place in gmatch(places, "[^,]+") do
      local node, last = root, nil
      for number, nested in gmatch(place, "(%d+)(%*?)") do
        number = tonumber(number)
        if last then
          local field = at(node, last)
          field.into = field.into or {}
          node = field.into
        end
        last = number
        if nested ~= "" then -- the message in it is one of the same kind
          at(node, number).into = node
          last = nil
        end
      end
      at(node, last).what, at(node, last).place = what, place
      if what == "name" then node.named = true end
      if what == "own" and first then node.owned, node[last].first = true, true end
      first = false
    end
  end
  return root
end)

-- Returns the number at p[i] and the place behind it, or nil.
local function varint(p, i, n)
  local value, unit = 0, 1
  for _ = 1, 10 do
    if i >= n then return nil end
    local b = p[i]
    i = i + 1
    value = value + (b % 128) * unit
    if b < 128 then return value, i end
    unit = unit * 128
  end
end

-- Walks the message in p[i..n-1]. Leaves what it finds in `found`. Returns what is wrong.
local function walk(s, p, i, n, node, found, depth)
  if depth > DEEPEST_MESSAGE then return "messages that are too deep in one another" end
  local named, owned = false, false
  while i < n do
    found.steps = found.steps + 1
    if found.steps > MOST_STEPS then return "too many fields" end
    local tag, length
    tag, i = varint(p, i, n)
    if not tag or tag >= 4294967296 then return "a field that is none" end
    local wire = tag % 8
    local number = (tag - wire) / 8
    local begin = i
    if wire == 0 then
      length, i = varint(p, i, n)
      if not length then return "a message that ends too early" end
    elseif wire == 1 then i = i + 8
    elseif wire == 5 then i = i + 4
    elseif wire == 2 then
      length, begin = varint(p, i, n)
      if not length or length > n - begin then return "a message that ends too early" end
      i = begin + length
    else
      return "a group"
    end
    if number == 0 then return "a field that is none" end
    if i > n then return "a message that ends too early" end
    local field = node[number]
    if field then
      local what = field.what
      if what == "other" then
        found.beyond = found.beyond or "field " .. field.place .. " of the message"
      elseif wire ~= 2 then
        return "field " .. number .. " with another wire type"
      elseif what then
        local text = sub(s, begin + 1, i)
        if what == "name" then
          if named then return "field " .. number .. " twice" end
          named = true
          if found.name and found.name ~= text then found.beyond = found.beyond or "another name in field " .. field.place end
          found.name = found.name or text
        elseif what == "same" then
          if found.same and text ~= "" and found.same ~= text then found.beyond = found.beyond or "another name in field " .. field.place end
          if text ~= "" then found.same, found.where = text, field.place end
        else
          if text ~= "" and text ~= DATABASE then return ANOTHER end
          if field.first then owned = text ~= "" end
        end
      end
      if field.into then
        if wire ~= 2 then return "field " .. number .. " with another wire type" end
        local why = walk(s, p, begin, i, field.into, found, depth + 1)
        if why then return why end
      end
    end
  end
  if node.named and not named then found.unnamed = true end
  if node.owned then found.owned = found.owned ~= false and owned end
end

function readers.message(handle, wants, name)
  local why = encoded(handle:headers())
  if why then return nil, nil, why end
  local fields = fields_of(wants:get("fields"))
  local body = handle:body()
  local s = body and body:getBytes(0, body:length()) or ""
  local n = #s
  if n < 5 then return nil, nil, "no message" end
  local p = ffi.cast("const uint8_t*", s)
  if p[0] ~= 0 then return nil, nil, "a message that is compressed" end
  if ((p[1] * 256 + p[2]) * 256 + p[3]) * 256 + p[4] ~= n - 5 then return nil, nil, "not exactly one message" end
  local found = { steps = 0 }
  why = walk(s, p, 5, n, fields, found, 1)
  if why then return nil, nil, why end
  local beyond = found.beyond
  if name then return name, beyond, nil, found.owned end
  name = found.name or ""
  if found.unnamed and name ~= "" then beyond = beyond or "a message in it without a name" end
  if found.same and found.same ~= name then beyond = beyond or "another name in field " .. found.where end
  if name == "" then
    if not beyond then return nil, nil, "a message without the name of what it is about" end
  elseif #name > LONGEST_NAME or not find(name, "^[%w._-]+$") then
    return nil, nil, "a name that no resource has"
  end
  return name, beyond, nil, found.owned
end

