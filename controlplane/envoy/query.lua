-- Names in the query, which Envoy does not normalise and for which every server has rules of its own: a name is taken from a
-- parameter that is there once, is spelled as it should be, and needs no escape.

local parameters_of = memo(function(text)
  local parameters = {}
  for what, keys in gmatch(text, "(%l+)=(%S+)") do
    for key in gmatch(keys, "[^,]+") do parameters[lower(key)] = { what = what, key = key } end
  end
  return parameters
end)

-- The name of a parameter as the most generous of servers would read it.
local function generously(key)
  key = gsub(key, "%%(%x%x)", function(hex) return char(tonumber(hex, 16)) end)
  return lower(gsub(gsub(gsub(key, "%z.*", ""), "%[.*", ""), "[%s+]", ""))
end

function readers.query(handle, wants, name)
  local query = match(handle:headers():get(":path"), "^[^?]*%?(.*)$") or ""
  if find(query, ";", 1, true) then return nil, nil, 'a ";" in the query' end
  local parameters = parameters_of(wants:get("query"))
  local wanted, beyond, owned
  for key, value in gmatch(query, "([^&=]*)=?([^&]*)") do
    local known = parameters[generously(key)]
    if known then
      if known.what == "also" then
        beyond = '"' .. known.key .. '" in the query'
      elseif key ~= known.key then
        return nil, nil, '"' .. key .. '" in place of "' .. known.key .. '" in the query'
      elseif known.what == "own" then
        if value ~= "" and value ~= DATABASE then return nil, nil, ANOTHER end
        owned = owned ~= false and value ~= ""
      elseif wanted then
        return nil, nil, 'more than one "' .. key .. '" in the query'
      elseif not find(value, "^[%w._:/@-]+$") or not is_name(value) then
        return nil, nil, 'a "' .. key .. '" in the query that no resource has'
      else
        wanted = value
      end
    end
  end
  name = name or wanted
  if not name and not beyond then return nil, nil, "a query without the name of what it is about" end
  return name or "", beyond, nil, owned
end

