-- The caller stage, at endpoints that take tokens: whoever has a certificate is its SPIFFE ID, whatever token comes along
-- (SDKs insist on sending some key); else whoever has a token that was verified is what that one stands for; nobody else
-- gets further. tokens.go says how claims are kept. If anything here fails, there is no caller, and then nothing is resolved.

-- OWN, before all of this, is what the SPIFFE IDs in the certificates begin with that this endpoint accepts.

local CLAIMS = "envoy.filters.http.jwt_authn" -- where the filter before this one leaves them
local LONGEST_SUBJECT = 255 -- bytes (OpenID Connect Core 1.0, section 2)
local LONGEST_REQUEST = 86400 -- seconds

-- Returns a subject as segment.TokenCaller writes it, or nil.
local function segment_of(subject)
  if type(subject) ~= "string" or subject == "" or #subject > LONGEST_SUBJECT then return nil end
  local plain = (subject == "." or subject == "..") and "[^%w-]" or "[^%w%.-]"
  return (gsub(subject, plain, function(c) return format("_%02X", byte(c)) end))
end

-- Returns the caller that claims stand for, and when they end, in seconds; or nil.
local function caller_of(how, stem, claims)
  local caller
  if how == "svid" then
    local id = claims.sub
    if type(id) == "string" and sub(id, 1, #stem) == stem and path_of(id) then caller = id end
  elseif how == "subject" then
    local segment = segment_of(claims.sub)
    caller = segment and stem .. segment
  end
  if caller and type(claims.exp) == "number" then return caller, claims.exp end
end

-- Reads what the verifier has left. Returns the caller and the end of its token, or nil and why there is none.
local function token_holder(found)
  local caller, ends
  local reasons = {}
  for key, value in pairs(found or {}) do
    local how, stem = match(key, "^(%l+):(spiffe://.+/)$")
    if how then
      if caller then return nil, "a token with two meanings" end
      caller, ends = caller_of(how, stem, value)
      if not caller then return nil, "a token whose subject names nobody" end
    else
      reasons[#reasons + 1] = match(key, "^why (.+)$") .. ": " .. value.message
    end
  end
  if caller then return caller, ends end
  table.sort(reasons)
  return nil, "no token that is good here (" .. table.concat(reasons, "; ") .. ")"
end

function envoy_on_request(handle)
  local tls = handle:streamInfo():downstreamSslConnection()
  local known = handle:streamInfo():dynamicMetadata()
  local caller, ends
  if tls:peerCertificatePresented() then
    caller, ends = certified(tls)
    if not caller or sub(caller, 1, #OWN) ~= OWN then return refuse(handle, 401, "come with a certificate that names nobody") end
  else
    caller, ends = token_holder(known:get(CLAIMS))
    if not caller then
      local challenge = handle:headers():get("authorization") and 'Bearer error="invalid_token"' or "Bearer" -- RFC 6750, section 3
      return refuse(handle, 401, ends, "come without a certificate, and without a token that is good here", challenge)
    end
    ends = math.min(ends, handle:timestamp() / 1000 + LONGEST_REQUEST)
  end
  known:set(SPACE, "caller", caller)
  known:set(SPACE, "ends", ends)
end
