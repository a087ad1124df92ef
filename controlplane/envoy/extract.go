package envoy

import (
	_ "embed"
	"slices"
	"strings"

	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	setstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"sallyport.dev/segment"
)

// Extraction is the one stage that looks into requests. All that it has to say it leaves in dynamic metadata:
//
//	name      what the request asks for: a model or a collection
//	id        or the UUID of it, which the names filter turns into a name
//	resolved  "=", once everything about the request has been judged and the name is known
//	refused   or why it can't be judged
//	caller, ends   at endpoints that take tokens: who asks, and until when that holds, in seconds (tokens.go)
//	input_tokens, output_tokens   usage, as the answer tells it
//
// Whoever replaces the stage replaces this file and extract.lua; all that follows reads the same.

//go:embed extract.lua
var extractScript string

// extractor is the filter.
func extractor() proto.Message {
	return &luav3.Lua{DefaultSourceCode: inline(callerScript + extractScript)}
}

// extraction tells the filter, for one route, where to find the resource: from "body" with a key; from "path" or
// "id" with the number of the segment, counted from 1 behind the first slash, and whether the rest of the path belongs to it.
func extraction(e *segment.Endpoint, r segment.Route) *structpb.Struct {
	fields := map[string]*structpb.Value{}
	set := func(key, value string) { fields[key] = structpb.NewStringValue(value) }
	switch r.Resource {
	case segment.BodyModel, segment.BodyName:
		set("from", "body")
		set("key", strings.TrimPrefix(string(r.Resource), "body:"))
	case segment.PathName, segment.PathID:
		set("from", strings.TrimPrefix(string(r.Resource), "path:"))
		segments := strings.Split(ownPath(e, r.Path), "/")
		variable := slices.IndexFunc(segments, func(s string) bool { return strings.HasPrefix(s, "{") })
		fields["segment"] = structpb.NewNumberValue(float64(variable))
		fields["rest"] = structpb.NewBoolValue(strings.HasSuffix(segments[variable], "=**}"))
	case segment.NoResource:
		set("from", "nothing")
	}
	if e.Tokens != nil {
		fields["told"] = structpb.NewBoolValue(true) // the caller is known already
	}
	return &structpb.Struct{Fields: fields}
}

func addressesByID(p segment.Protocol) bool {
	return slices.ContainsFunc(p.Routes(), func(r segment.Route) bool { return r.Resource == segment.PathID })
}

// judged takes over what extraction found.
func judged(e *segment.Endpoint) []state {
	states := []state{
		{stateName, "%DYNAMIC_METADATA(sallyport:name)%"},
		{stateResolved, "%DYNAMIC_METADATA(sallyport:resolved)%"},
	}
	if e.Tokens != nil {
		states = append(states, state{stateCaller, "%DYNAMIC_METADATA(sallyport:caller)%"})
	}
	if addressesByID(e.Protocol) {
		states = append(states, state{stateID, "%DYNAMIC_METADATA(sallyport:id)%"})
	}
	return states
}

// question puts it all together, and lets the route be chosen again where the model chooses the backend.
func question(e *segment.Endpoint) *setstatev3.Config {
	const request = "%METADATA(ROUTE:sallyport:operation)%%FILTER_STATE(sallyport.resolved:PLAIN)%%FILTER_STATE(sallyport.name:PLAIN)%"
	config := setState(
		state{stateRequest, request},
		state{stateQuestion, "%FILTER_STATE(sallyport.resolved:PLAIN)%%FILTER_STATE(sallyport.class:PLAIN)%|" + request},
	)
	config.ClearRouteCache = len(modelPools(e)) > 1
	return config
}
