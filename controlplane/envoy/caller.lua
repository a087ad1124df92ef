-- Who asks? What both scripts know of it: this one stands before each of them.

local byte, sub, gsub, find, match, format = string.byte, string.sub, string.gsub, string.find, string.match, string.format

local SPACE = "sallyport"

-- Whether all segments of a path have a name: none is empty, "." or "..".
local function is_plain(path)
  path = path .. "/"
  return not (find(path, "//", 1, true) or find(path, "/./", 1, true) or find(path, "/../", 1, true))
end

-- The path of a SPIFFE ID (SPIFFE-ID, section 2), or nil if it is none.
local function path_of(id)
  local path = match(id, "^spiffe://[a-z0-9%._-]+(/[%w%._/-]+)$")
  return path and is_plain(path) and path
end

-- Envoy's validator lets in whoever has several URI names, and any letters in them. Only one name that is a SPIFFE ID
-- (X509-SVID, section 2) can't be taken for another caller or for a part of the question.
-- Returns the name and when the certificate ends, in seconds, or nil if it is not one that names a caller.
local function certified(tls)
  local names = tls:uriSanPeerCertificate()
  if #names == 1 and path_of(names[1]) then return names[1], tls:expirationPeerCertificate() end
end

-- Answers in place of the backend. Operators see why; callers see what to say, or the same.
local function refuse(handle, status, why, say, challenge)
  handle:streamInfo():dynamicMetadata():set(SPACE, "refused", why)
  handle:respond({ [":status"] = tostring(status), ["www-authenticate"] = challenge }, "The request has " .. (say or why) .. ".")
end

