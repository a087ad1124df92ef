
-- Names in requests of MCP, 2026-07-28 ("Streamable HTTP", "Request Metadata"). The headers say what the body says, or the
-- request is refused: so a server runs what was judged here, whichever of them it goes by. Older versions have sessions, in
-- which servers look at no such header; they are refused.

local VERSION = "2026-07-28"
local ENVELOPE = "io.modelcontextprotocol/protocolVersion"
local BASE64 = "=?base64?" -- begins a name that is not plain in a header
local LONGEST = 1024       -- bytes of a name: some are URIs

-- Codes of JSON-RPC 2.0, section 5.1, and of MCP.
local PARSE, INVALID, NO_METHOD, PARAMS, MISMATCH, UNSUPPORTED = -32700, -32600, -32601, -32602, -32020, -32022

local NO_KEYS = { any = {}, at = {}, maybe = {} }
local REQUEST = { id = "id", method = "method", params = "params" } -- by how they read in any letters
local META = { _meta = "_meta" }
local VERSIONS = { [lower(ENVELOPE)] = ENVELOPE }

-- Refuses the request in the words of JSON-RPC.
local function reject(handle, status, code, why, requested)
  local data = { request_id = handle:headers():get("x-request-id") }
  if requested then data.supported, data.requested = { VERSION }, requested end
  handle:streamInfo():dynamicMetadata():set(SPACE, "rpc_error", { code = code, message = "The request has " .. why .. ".", data = data })
  refuse(handle, status, why)
end

-- Returns the place of the comma or bracket behind the value at s[i], of a text that read_object has read to its end.
local function past_value(s, p, i, n)
  local depth = 0
  while true do
    i = find(s, '["%[%]{},]', i)
    local c = byte(s, i)
    if c == 34 then
      i = skip_string(s, p, i + 1, n)
    elseif c == 123 or c == 91 then
      depth, i = depth + 1, i + 1
    elseif depth == 0 then
      return i
    else
      if c ~= 44 then depth = depth - 1 end
      i = i + 1
    end
  end
end

-- Returns where the values of some keys stand in the object at s[i], of such a text; or nil and what is wrong with it. A key
-- that some reader takes for one of them is not there besides.
local function members(s, p, i, n, keys)
  if not i or byte(s, i) ~= 123 then return nil, "no object" end
  local found = {}
  i = past_space(s, i + 1)
  while byte(s, i) ~= 125 do
    local after = skip_string(s, p, i + 1, n)
    local key = sub(s, i + 1, after - 2)
    local value = past_space(s, past_space(s, after) + 1)
    local known = keys[folded(gsub(key, "\\/", "/"))]
    if known then
      if key ~= known then return nil, '"' .. known .. '" in other letters' end
      if found[key] then return nil, 'more than one "' .. key .. '"' end
      found[key] = value
    end
    i = past_value(s, p, value, n)
    if byte(s, i) == 44 then i = past_space(s, i + 1) end
  end
  return found
end

-- Returns the id of the request as the answer has it, or false if it is one that is not repeated, or nil if it is none.
local function id_at(s, p, i, n)
  local c = i and byte(s, i)
  if c == 34 then
    local text = read_string(s, p, i, n, "id")
    return text and #text <= LONGEST and text or false
  elseif c == 45 or c and c >= 48 and c <= 57 then
    local digits = match(s, "^%-?%d+", i)
    return #digits <= 15 and not find(s, "^[.eE]", i + #digits) and tonumber(digits) -- a double is exact so far
  end
end

-- Whether a URI is as RFC 3986, section 6.2.2, has it, so that not every way to write it needs a Deny of its own.
local function is_uri(uri)
  local rest = match(uri, "^[a-z][a-z0-9+.-]*:(.*)$")
  if not rest or find(rest, "\\", 1, true) then return false end
  for escape in gmatch(rest, "%%(.?.?)") do
    local c = find(escape, "^%x%x$") and char(tonumber(escape, 16))
    if not c or find(c, "[%w._~-]") then return false end
  end
  local path = match(rest, "^[^?#]*") .. "/"
  return not (find(path, "/./", 1, true) or find(path, "/../", 1, true))
end

-- Whether the one value of a header is the name.
local function says(handle, given, name)
  if sub(given, 1, #BASE64) == BASE64 then return given == BASE64 .. handle:base64Escape(name) .. "?=" end
  return given == name
end

function readers.rpc(handle, wants)
  local headers, row = handle:headers(), {}
  for _, key in ipairs({ "method", "param", "kind" }) do row[key] = wants:get(key) end
  local given = {}
  for _, key in ipairs({ "mcp-protocol-version", "mcp-method", "mcp-name" }) do
    local n = headers:getNumValues(key)
    if n > 1 then return reject(handle, 400, MISMATCH, 'more than one header "' .. key .. '"') end
    given[key] = n == 1 and headers:get(key) or ""
  end
  local why = encoded(headers)
  if why then return reject(handle, 400, PARSE, why) end
  if headers:get(":method") ~= "POST" then return reject(handle, 405, INVALID, "another method of HTTP than POST") end

  local body = handle:body() -- the script may rest here
  local s = body and body:getBytes(0, body:length()) or ""
  local n, p = #s, ffi.cast("const uint8_t*", s)
  local begin = past_space(s, 1)
  if not begin then return reject(handle, 400, PARSE, "no body") end
  if byte(s, begin) == 91 then return reject(handle, 400, INVALID, "a batch as its body") end
  local _, _, bad = read_object(s, NO_KEYS, "", nil, {})
  if bad then return reject(handle, 400, PARSE, bad) end
  local top
  top, why = members(s, p, begin, n, REQUEST)
  if not top then return reject(handle, 400, INVALID, why) end
  local id = id_at(s, p, top.id, n)
  if id then handle:streamInfo():dynamicMetadata():set(SPACE, "rpc_id", id) end

  local version = given["mcp-protocol-version"]
  if version ~= VERSION then
    return reject(handle, 400, UNSUPPORTED, "another protocol version than " .. VERSION, sub(version, 1, 64))
  end
  if id == nil then return reject(handle, 400, INVALID, "no id, a string or number") end
  local method
  method, why = read_string(s, p, top.method, n, "method")
  if not method then return reject(handle, 400, INVALID, why) end
  if method ~= given["mcp-method"] then
    return reject(handle, 400, MISMATCH, 'another method in its body than in the header "mcp-method"')
  end
  if method ~= row.method then return reject(handle, 404, NO_METHOD, "a method that is not part of the API here") end

  local keys = META
  if row.param then keys = { _meta = "_meta", [row.param] = row.param } end
  local params, meta, of
  params, why = members(s, p, top.params, n, keys)
  if not params then return reject(handle, 400, PARAMS, why .. ' in "params"') end
  meta, why = members(s, p, params._meta, n, VERSIONS)
  if not meta then return reject(handle, 400, PARAMS, why .. ' in "_meta"') end
  of, why = read_string(s, p, meta[ENVELOPE], n, ENVELOPE)
  if not of then return reject(handle, 400, PARAMS, why) end
  if of ~= VERSION then return reject(handle, 400, MISMATCH, 'another protocol version in "_meta" than in the header') end
  if not row.param then return "" end

  local name
  name, why = read_string(s, p, params[row.param], n, row.param)
  if not name then return reject(handle, 400, PARAMS, why) end
  if name == "" or #name > LONGEST or find(name, "%c") or row.param == "uri" and not is_uri(name) then
    return reject(handle, 400, PARAMS, "a " .. row.param .. " that nothing here has")
  end
  if not says(handle, given["mcp-name"], name) then
    return reject(handle, 400, MISMATCH, 'another ' .. row.param .. ' in its body than in the header "mcp-name"')
  end
  return row.kind .. name
end
