package v1alpha1

import (
	"reflect"
	"strings"

	"sallyport.dev/segment"
)

// schema is what each type allows, read off the Go types as far as it was needed.
type schema map[reflect.Type]*shape

type shape struct {
	fields  []field  // of a struct
	allowed []string // of an enumeration
}

// field is one field of a struct, by the name that users write.
type field struct {
	name     string
	index    int
	required bool
}

func (s schema) of(t reflect.Type) *shape {
	if known := s[t]; known != nil {
		return known
	}
	known := &shape{allowed: allowed(t)}
	if t.Kind() == reflect.Struct {
		for f := range t.Fields() {
			if name, options, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
				known.fields = append(known.fields, field{name, f.Index[0], options != "omitempty"})
			}
		}
	}
	s[t] = known
	return known
}

// allowed returns all values of an enumeration.
func allowed(t reflect.Type) []string {
	switch t {
	case reflect.TypeFor[APIVersion]():
		return []string{string(Version)}
	case reflect.TypeFor[Kind]():
		return texts([]Kind{KindEndpoint, KindGateway, KindGrant, KindTokenIssuer, KindTrustDomain, KindWorkload})
	case reflect.TypeFor[segment.Protocol]():
		return texts(segment.Protocols())
	case reflect.TypeFor[segment.Operation]():
		return texts(segment.Operations())
	case reflect.TypeFor[segment.Effect]():
		return texts([]segment.Effect{segment.Allow, segment.Deny})
	case reflect.TypeFor[segment.Mode]():
		return texts([]segment.Mode{segment.Enforce, segment.Shadow})
	case reflect.TypeFor[Scope]():
		return texts([]Scope{perCaller, shared})
	case reflect.TypeFor[segment.Period]():
		return texts(segment.Periods())
	case reflect.TypeFor[Day]():
		return days
	case reflect.TypeFor[segment.EndpointProfile]():
		return texts([]segment.EndpointProfile{segment.HTTPSWeb, segment.HTTPSSPIFFE})
	case reflect.TypeFor[segment.TLSMode]():
		return texts([]segment.TLSMode{segment.TLSNone, segment.TLSServer, segment.TLSMutual})
	}
	return nil
}

func (s *shape) names() []string {
	var names []string
	for _, f := range s.fields {
		names = append(names, f.name)
	}
	return names
}
