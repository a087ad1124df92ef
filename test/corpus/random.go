package corpus

import (
	"fmt"
	"strings"
	_ "time/tzdata" // no test needs the time zones of its machine

	"pgregory.net/rapid"

	"sallyport.dev/api/v1alpha1"
	"sallyport.dev/authz"
	"sallyport.dev/segment"
)

// Small alphabets, so that what is granted, denied and asked for collides.
var (
	paths     = []string{"/a", "/b", "/t", "/t/a", "/t/u/a", "/t/u/b"}
	callers   = append([]string{"/t/*", "/t/u/*", "/*"}, paths...)
	resources = []string{"a", "ab", "abc", "b", "a*", "ab*", "b*", "*"}
)

// Early, Between and Late are before, at and after the moment that some of the random grants expire at.
const (
	Early   = "2026-01-01T00:00:00Z"
	Between = "2026-06-01T00:00:00Z"
	Late    = "2026-12-01T00:00:00Z"
)

const head = "---\napiVersion: sallyport.dev/v1alpha1\nkind: %s\nmetadata: {name: %s}\nspec: "

// Endpoints are documents: one with models in two pools, one with any model, and one with collections.
func Endpoints() []string {
	const backend = "{name: %s, addresses: ['127.0.0.1:%d'], tls: {mode: None}}"
	spec := func(name, protocol, more string, backends ...string) string {
		return fmt.Sprintf(head, "Endpoint", name) +
			fmt.Sprintf("{hostnames: [%s.internal], protocol: %s, backends: [%s]%s}\n", name, protocol, strings.Join(backends, ", "), more)
	}
	one, two := fmt.Sprintf(backend, "one", 8001), fmt.Sprintf(backend, "two", 8002)
	return []string{
		spec("chat", "OpenAI", ", models: [{name: a, aliases: [abc], backends: [one]}, {name: ab}, {name: b, backends: [one]}]", one, two),
		spec("open", "OpenAI", "", one),
		spec("docs", "Chroma", "", two),
	}
}

// Grant is a document with a random grant to one or two of the Endpoints.
func Grant(name, effect, mode string) *rapid.Generator[string] {
	return rapid.Custom(func(t *rapid.T) string {
		var to []string
		for range rapid.IntRange(1, 2).Draw(t, "targets") {
			endpoint := rapid.SampledFrom([]string{"chat", "open", "docs"}).Draw(t, "endpoint")
			operations := []string{"Infer", "Embed"}
			if endpoint == "docs" {
				operations = []string{"Read", "Write", "Admin"}
			}
			to = append(to, fmt.Sprintf("{endpoint: %s, operations: [%s], resources: ['%s']}", endpoint,
				strings.Join(some(operations).Draw(t, "operations"), ", "), strings.Join(some(resources).Draw(t, "resources"), "', '")))
		}
		var from []string
		for _, c := range some(callers).Draw(t, "callers") {
			if c == "/*" {
				from = append(from, "{trustDomain: example.org}")
			} else {
				from = append(from, fmt.Sprintf("{spiffeID: 'spiffe://example.org%s'}", c))
			}
		}
		budget := ""
		if effect == "Allow" && rapid.IntRange(0, 3).Draw(t, "budget") == 0 {
			budget = fmt.Sprintf(", budget: {requests: {max: %d, per: %s}, scope: %s}", rapid.IntRange(1, 2).Draw(t, "max"),
				rapid.SampledFrom([]string{"Minute", "Day"}).Draw(t, "per"), rapid.SampledFrom([]string{"Caller", "Shared"}).Draw(t, "scope"))
		}
		return fmt.Sprintf(head+"{effect: %s, mode: %s, from: [%s], to: [%s]%s%s}\n", "Grant", name, effect, mode,
			strings.Join(from, ", "), strings.Join(to, ", "), times().Draw(t, "times"), budget)
	})
}

// Zones are time zones in which clocks are put forward and back, by an hour and by half of one, or never.
var Zones = []string{"UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"}

var clocks = []string{"00:00", "01:45", "02:00", "02:30", "03:00", "08:00", "18:00", "23:30"}

// times are when a grant holds: for most of them, always.
func times() *rapid.Generator[string] {
	return rapid.Custom(func(t *rapid.T) string {
		limits := ""
		if rapid.IntRange(0, 4).Draw(t, "expires") == 0 {
			limits += ", expires: '" + Between + "'"
		}
		if rapid.IntRange(0, 7).Draw(t, "not before") == 0 {
			limits += ", notBefore: '" + rapid.SampledFrom([]string{Between, "2026-03-29T01:30:00Z"}).Draw(t, "moment") + "'"
		}
		if rapid.IntRange(0, 4).Draw(t, "windows") > 0 {
			return limits
		}
		var windows []string
		for range rapid.IntRange(1, 2).Draw(t, "many") {
			from, to := rapid.SampledFrom(clocks).Draw(t, "from"), rapid.SampledFrom(clocks).Draw(t, "to")
			if from == to {
				to = "24:00"
			}
			days := ""
			if rapid.Bool().Draw(t, "some days") {
				days = ", days: [" + strings.Join(some([]string{"Sun", "Mon", "Wed", "Sat"}).Draw(t, "days"), ", ") + "]"
			}
			windows = append(windows, fmt.Sprintf("{from: '%s', to: '%s', timeZone: %s%s}", from, to, rapid.SampledFrom(Zones).Draw(t, "zone"), days))
		}
		return limits + ", windows: [" + strings.Join(windows, ", ") + "]"
	})
}

func some(of []string) *rapid.Generator[[]string] {
	return rapid.SliceOfNDistinct(rapid.SampledFrom(of), 1, min(3, len(of)), rapid.ID[string])
}

// Grants are documents: up to ten random grants, some of them Deny and some in Shadow mode.
func Grants() *rapid.Generator[[]string] {
	return rapid.Custom(func(t *rapid.T) []string {
		docs := make([]string, rapid.IntRange(0, 10).Draw(t, "grants"))
		for i := range docs {
			docs[i] = Grant(fmt.Sprintf("g%d", i), rapid.SampledFrom([]string{"Allow", "Allow", "Allow", "Deny"}).Draw(t, "effect"),
				rapid.SampledFrom([]string{"Enforce", "Enforce", "Enforce", "Shadow"}).Draw(t, "mode")).Draw(t, "grant")
		}
		return docs
	})
}

// Assemble makes a configuration of documents that have nothing wrong with them.
func Assemble(t rapid.TB, docs []string) segment.Config {
	t.Helper()
	config, problems := v1alpha1.Assemble(decode("f", docs), Options())
	if problems != nil {
		t.Fatalf("%v\n%s", problems, strings.Join(docs, ""))
	}
	return config
}

// AssembleBeside is Assemble with a shadow folder.
func AssembleBeside(t rapid.TB, docs, shadow []string) segment.Config {
	t.Helper()
	config := Assemble(t, docs)
	grants, problems := v1alpha1.AssembleShadow(decode("f", docs), decode("s", shadow), Options())
	if problems != nil {
		t.Fatalf("%v\n%s", problems, strings.Join(shadow, ""))
	}
	config.Shadow, config.ShadowFolder = grants, true
	return config
}

func decode(files string, docs []string) []v1alpha1.Document {
	var all []v1alpha1.Document
	for i, d := range docs {
		all = append(all, v1alpha1.Decode(fmt.Sprintf("%s%02d", files, i), []byte(d))...)
	}
	return all
}

// Requests are all requests that may make a difference to the Endpoints and Grants.
func Requests() []authz.Request {
	var all []authz.Request
	for _, caller := range append([]string{"/c", "/t/c", "/t/u/c", "/t/u", ""}, paths...) {
		for _, endpoint := range []string{"chat", "open", "docs", "nowhere"} {
			for _, o := range append(segment.Operations(), segment.Discover, segment.Enter) {
				for _, resource := range []string{"", "a", "ab", "abc", "abcd", "aa", "b", "ba", "c", "a*"} {
					if (resource == "") == (o == segment.Enter) {
						all = append(all, authz.Request{Caller: "spiffe://example.org" + caller,
							Endpoint: segment.EndpointName(endpoint), Operation: o, Resource: resource})
					}
				}
			}
		}
	}
	return append(all, authz.Request{}, authz.Request{Caller: "spiffe://other.test/a", Endpoint: "docs", Operation: segment.Read, Resource: "a"})
}
