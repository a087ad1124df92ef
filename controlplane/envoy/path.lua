-- Names in the path. They never need an escape, so none is accepted.

local LONGEST_PATH = 2048 -- bytes
local UUID = "^" .. ("[0-9a-f]"):rep(8) .. ("%-" .. ("[0-9a-f]"):rep(4)):rep(3) .. "%-" .. ("[0-9a-f]"):rep(12) .. "$"

-- Returns the segment of the path, without the verb behind it, or nil.
local function read_path(path, number, rest, verb)
  path = match(path, "^[^?#]*")
  for _ = 1, number do
    path = match(path, "^[^/]*/(.*)$")
    if not path then return nil end
  end
  if rest then return match(path, "^[%w._:/@-]+$") end
  path = match(path, "^[^/]*")
  if verb then
    if sub(path, -#verb) ~= verb then return nil end
    path = sub(path, 1, -#verb - 1)
  end
  return match(path, "^[%w._-]+$")
end

function readers.path(handle, wants)
  return read_path(handle:headers():get(":path"), wants:get("segment"), wants:get("rest"), wants:get("verb"))
end

function readers.id(handle, wants)
  local id = readers.path(handle, wants)
  return id and find(id, UUID) and id or nil
end

-- The path as a whole. What Envoy has not normalised, servers read in different ways: escapes, parameters behind ";" (which
-- servlets cut off), a dot at the end (which Windows does), and a slash there (which many do not see at all).
function readers.whole(handle, wants)
  local path = match(handle:headers():get(":path"), "^[^?#]*")
  local template = wants:get("name")
  if #path > LONGEST_PATH then return nil, nil, "a path that is too long" end
  if not find(path, "^[%w/._~:@!$&'()*+,=-]+$") then return nil, nil, "a path that servers read in different ways" end
  if find(path, "%./", 1, false) or sub(path, -1) == "." then return nil, nil, "a path with a dot at the end of a segment" end
  if not template and path ~= "/" and sub(path, -1) == "/" then return nil, nil, "a slash at the end of the path" end
  return template or path
end

-- The full name of a method of gRPC.
function readers.method(handle)
  return match(handle:headers():get(":path"), "^/([%w._]+/[%w_]+)$")
end

