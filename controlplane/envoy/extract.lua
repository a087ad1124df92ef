-- The extraction stage: what does a request ask for?
--
-- Strict: what two parsers could read differently is refused. The bytes themselves pass through unchanged.
-- If anything here fails, "resolved" is not set, and what is not resolved is denied.
-- extract.go says where a route has its resource and what is left where. caller.lua stands before this; behind it stand the
-- readers that the endpoint's routes need, and before all what is the same for all of them:
--
-- TOLD      whether the caller stage knows the caller already
-- NAMES     how names here look, if not all do that JSON can hold
-- DATABASE  the one database that requests may name, if there is but one; IMPLIED if it need not be named; HEADER is where it
--           can be named, too

local ffi = require("ffi")
local lower, gmatch, char, bor = string.lower, string.gmatch, string.char, require("bit").bor

local ANOTHER = "another database than this endpoint's own"
local LONGEST_NAME = 256  -- bytes
-- Of a body: keys, values, commas and brackets, or fields. A worker reads so many in tens of milliseconds.
local MOST_STEPS = 400000

-- Readers, by name. Each is given the stream, the route's context and the name that those before it have found. It returns
-- the name ("" if there is none) and what makes the request ask for more than that name; or nil, nil and what is wrong with
-- the request; or nil, if nothing is called like this. A fourth is whether the request names DATABASE. One that reads the body
-- is the last: whatever is held of Envoy is void behind that.
local readers = {}

-- Nothing is named: with an operation that is granted, only a grant on everything has it.
function readers.nothing() return "" end

-- Makes things of texts, each once.
local function memo(make)
  local known = {}
  return function(text)
    local made = known[text]
    if made == nil then
      made = make(text)
      known[text] = made
    end
    return made
  end
end

local steps_of = memo(function(text)
  local steps = {}
  for word in gmatch(text, "%S+") do
    if word == "endless" or word == "owned" then
      steps[word] = true
    else
      steps[#steps + 1] = readers[word] or error("no reader " .. word)
    end
  end
  return steps
end)

-- Whether the bytes of a body are what they seem. A backend that decodes them first reads another body, perhaps one that is
-- good both ways.
local function encoded(headers)
  if headers:get("content-encoding") then return "an encoding" end
  local charset = lower(headers:get("content-type") or "")
  if find(charset, "charset", 1, true) and find(gsub(charset, 'charset="?utf%-8"?', ""), "charset", 1, true) then
    return "another charset than UTF-8"
  end
end

local function is_name(name)
  return #name > 0 and #name <= LONGEST_NAME and not find(name, "%c") and is_plain("/" .. name)
end

-- A stream of which no end is known is ended by the time that this header gives it (gRPC over HTTP/2, "Timeout").
local units = { H = 3600000, M = 60000, S = 1000, m = 1, u = 1 / 1000, n = 1 / 1000000 }
local function end_with(handle, ms)
  local headers = handle:headers()
  local n, unit = match(headers:get("grpc-timeout") or "", "^(%d+)([HMSmun])$")
  ms = math.max(1, math.min(ms, n and #n <= 8 and n * units[unit] or ms, 86400000)) -- 0 could be no end at all
  headers:replace("grpc-timeout", format("%dm", ms))
  handle:clearRouteCache() -- then it is read again
end

function envoy_on_request(handle)
  local wants = handle:filterContext()
  local from = wants:get("from")
  if not from then return end -- in no table: denied, because nothing is resolved
  local ends, _
  if TOLD then
    local known = handle:streamInfo():dynamicMetadata():get(SPACE)
    ends = known and known.ends
  else
    _, ends = certified(handle:streamInfo():downstreamSslConnection())
  end
  if not ends then return end

  local steps = steps_of(from)
  local owned = IMPLIED
  if HEADER then
    local database = handle:headers():get(HEADER)
    if database and database ~= "" then
      if database ~= DATABASE then return refuse(handle, 400, ANOTHER) end
      owned = true
    end
  end
  local name, more, beyond, why, own
  for i = 1, #steps do
    name, more, why, own = steps[i](handle, wants, name)
    if why then return refuse(handle, 400, why) end
    if not name then return end -- no resource is called like this: denied
    beyond, owned = beyond or more, owned or own
  end
  if steps.owned and not owned then return refuse(handle, 400, ANOTHER) end
  if NAMES and name ~= "" and not find(name, NAMES) then return refuse(handle, 400, "a name that no resource has") end

  -- What begins on a certificate ends with it.
  local ms = ends * 1000 - handle:timestamp()
  if ms <= 0 then return refuse(handle, 401, "come with a certificate that has expired since") end
  if steps.endless then
    end_with(handle, ms)
  else
    handle:headers():replace("x-envoy-upstream-rq-timeout-ms", format("%d", ms))
  end

  local found = handle:streamInfo():dynamicMetadata()
  if beyond then
    found:set(SPACE, "beyond", "on everything here, which " .. beyond .. " asks for")
    if name ~= "" then found:set(SPACE, "named", name) end
  elseif steps[1] == readers.id then
    found:set(SPACE, "id", name)
    return
  elseif name ~= "" then
    found:set(SPACE, "name", name)
  end
  found:set(SPACE, "resolved", "=")
end

