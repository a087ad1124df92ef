package ingest

import (
	"encoding/json"
	"flag"
	"os"
	"regexp"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport.dev/telemetry"
)

var update = flag.Bool("update", false, "write the results into testdata")

// section is one "-- NAME --" line of a golden file and what follows it.
var section = regexp.MustCompile(`(?m)^-- (.+)\.entry --\n((?s:.*?))^-- .+\.flow --\n((?:\{|no flow).*\n)?`)

func TestFlowsOfRecordedEntries(t *testing.T) {
	const file = "testdata/flows.txtar"
	golden, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	updated, cases := string(golden), section.FindAllStringSubmatch(string(golden), -1)
	if len(cases) != 19 {
		t.Fatalf("%d cases", len(cases))
	}
	for _, c := range cases {
		name, entry, want := c[1], c[2], c[3]
		t.Run(name, func(t *testing.T) {
			got := flowJSON(t, name, []byte(entry))
			if !*update && got != want {
				t.Errorf("got\n%swant\n%s", got, want)
			}
			head := "-- " + name + ".flow --\n"
			updated = strings.Replace(updated, head+want, head+got, 1)
		})
	}
	if *update {
		if err := os.WriteFile(file, []byte(updated), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func flowJSON(t *testing.T, name string, entry []byte) string {
	t.Helper()
	node := &corev3.Node{Id: "gw"}
	var flow telemetry.Flow
	read := map[string]func(*accesslogv3.TCPAccessLogEntry, *corev3.Node) (telemetry.Flow, bool){"tcp": RefusedOf, "connect": ConnectionOf}
	kind, _, _ := strings.Cut(name, " ")
	if read := read[kind]; read != nil {
		var e accesslogv3.TCPAccessLogEntry
		if err := protojson.Unmarshal(entry, &e); err != nil {
			t.Fatal(err)
		}
		var ok bool
		if flow, ok = read(&e, node); !ok {
			return "no flow\n"
		}
	} else {
		var e accesslogv3.HTTPAccessLogEntry
		if err := protojson.Unmarshal(entry, &e); err != nil {
			t.Fatal(err)
		}
		flow = FlowOf(&e, node)
	}
	out, err := json.Marshal(flow)
	if err != nil {
		t.Fatal(err)
	}
	return string(out) + "\n"
}

// entry is a request that RBAC judged so.
func entry(t *testing.T, rbac map[string]any, status uint32, details string) *accesslogv3.HTTPAccessLogEntry {
	t.Helper()
	s, err := structpb.NewStruct(rbac)
	if err != nil {
		t.Fatal(err)
	}
	return &accesslogv3.HTTPAccessLogEntry{
		CommonProperties: &accesslogv3.AccessLogCommon{Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{rbacMetadata: s}}},
		Response:         &accesslogv3.HTTPResponseProperties{ResponseCode: wrapperspb.UInt32(status), ResponseCodeDetails: details},
	}
}

func TestVerdict(t *testing.T) {
	for _, test := range []struct {
		name, result, rule string
		status             uint32
		details            string
		want               telemetry.Verdict
		wantRule           string
	}{
		{"allowed", "allowed", "grant/a", 200, "via_upstream", telemetry.Allowed, "grant/a"},
		{"allowed, unknown to the backend", "allowed", "grant/a", 404, "via_upstream", telemetry.Allowed, "grant/a"},
		{"backend fails", "allowed", "grant/a", 500, "via_upstream", telemetry.Failed, "grant/a"},
		{"backend never answers", "allowed", "grant/a", 0, "upstream_per_try_timeout", telemetry.Failed, "grant/a"},
		{"caller goes away", "allowed", "grant/a", 0, "downstream_remote_disconnect", telemetry.Allowed, "grant/a"},
		{"allowed, and counted", "allowed", "grant/a requests=1/Day tokens=2/Month shared open", 200, "via_upstream", telemetry.Allowed, "grant/a"},
		{"over its budget", "allowed", "grant/a requests=1/Day", 429, "ext_authz_denied", telemetry.Limited, "grant/a"},
		{"a budget that can't be counted", "allowed", "grant/a requests=1/Day", 503, "ext_authz_error", telemetry.Limited, "grant/a"},
		{"the backend is over some budget", "allowed", "grant/a requests=1/Day", 429, "via_upstream", telemetry.Allowed, "grant/a"},
		{"denied by a rule", "denied", "grant/no", 403, "rbac", telemetry.Denied, "grant/no"},
		{"denied while authorization is missing", "denied", "", 403, "rbac", telemetry.Denied, "default-deny"},
		{"denied whatever the status", "denied", "grant/no", 200, "", telemetry.Denied, "grant/no"},
		{"a result that nobody knows", "allowed-ish", "grant/a", 200, "", telemetry.Denied, "grant/a"},
		{"not judged, even with 200", "", "grant/a", 200, "", telemetry.Refused, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := FlowOf(entry(t, map[string]any{"enforced_engine_result": test.result, "enforced_effective_policy_id": test.rule},
				test.status, test.details), nil)
			if f.Verdict != test.want || f.Rule != test.wantRule {
				t.Errorf("got %s by %q, want %s by %q", f.Verdict, f.Rule, test.want, test.wantRule)
			}
		})
	}
}

// A caller can set any header. None may speak for the gateway.
func TestHeadersAreNotBelieved(t *testing.T) {
	e := entry(t, map[string]any{"enforced_engine_result": "denied"}, 403, "rbac")
	lies := map[string]string{
		"enforced_engine_result": "allowed", "sallyport.name": "public", "endpoint": "other", "x-forwarded-client-cert": "URI=spiffe://example.org/boss",
	}
	e.Request = &accesslogv3.HTTPRequestProperties{RequestHeaders: lies, ForwardedFor: "spiffe://example.org/boss"}
	f := FlowOf(e, nil)
	if f.Verdict != telemetry.Denied || !f.Caller.IsZero() || f.Resource != "" || f.Endpoint != "" {
		t.Errorf("believed a header: %+v", f)
	}
}

// Without a certificate the caller is whoever the gateway says that the token is of; with one, it is the certificate's.
func TestCallerByToken(t *testing.T) {
	e := entry(t, nil, 200, "")
	ours, _ := structpb.NewStruct(map[string]any{"caller": "spiffe://oidc.example.org/corp/alice"})
	e.CommonProperties.Metadata.FilterMetadata[ourMetadata] = ours
	if f := FlowOf(e, nil); f.Caller.Path() != "/corp/alice" {
		t.Errorf("caller %q", f.Caller)
	}
	e.CommonProperties.TlsProperties = &accesslogv3.TLSProperties{PeerCertificateProperties: &accesslogv3.TLSProperties_CertificateProperties{
		SubjectAltName: []*accesslogv3.TLSProperties_CertificateProperties_SubjectAltName{{
			San: &accesslogv3.TLSProperties_CertificateProperties_SubjectAltName_Uri{Uri: "spiffe://example.org/app"}}}}}
	if f := FlowOf(e, nil); f.Caller.Path() != "/app" {
		t.Errorf("caller %q", f.Caller)
	}
}

func TestResource(t *testing.T) {
	str, _ := anypb.New(wrapperspb.String("smollm2"))
	raw, _ := anypb.New(wrapperspb.Bytes([]byte("caf\xe9")))
	none, _ := anypb.New(wrapperspb.String(""))
	for _, test := range []struct {
		name     string
		state    *anypb.Any
		metadata string
		want     string
	}{
		{"filter state wins", str, "other", "smollm2"},
		{"bytes", raw, "", "caf\uFFFD"},
		{"filter state without a value", none, "other", "other"},
		{"metadata", nil, "handbook", "handbook"},
		{"filter state of an unknown type", &anypb.Any{TypeUrl: "type.googleapis.com/no.such.Type"}, "handbook", "handbook"},
		{"neither", nil, "", ""},
	} {
		e := entry(t, nil, 200, "")
		ours, _ := structpb.NewStruct(map[string]any{"name": test.metadata})
		e.CommonProperties.Metadata.FilterMetadata[ourMetadata] = ours
		if test.state != nil {
			e.CommonProperties.FilterStateObjects = map[string]*anypb.Any{nameState: test.state}
		}
		if got := FlowOf(e, nil).Resource; got != test.want {
			t.Errorf("%s: got %q, want %q", test.name, got, test.want)
		}
	}
}

func TestCounts(t *testing.T) {
	for _, test := range []struct {
		in   any
		want int64
	}{{12.0, 12}, {"12", 12}, {-3.0, 0}, {1e300, 0}, {"many", 0}, {nil, 0}, {true, 0}} {
		ours, _ := structpb.NewStruct(map[string]any{"n": test.in})
		if got := (fields{ours}).count("n"); got != test.want {
			t.Errorf("%v: got %d, want %d", test.in, got, test.want)
		}
	}
}

func TestRecordsAreBounded(t *testing.T) {
	long := strings.Repeat("é", 100_000)
	e := entry(t, map[string]any{"enforced_engine_result": "denied"}, 403, long)
	e.Request = &accesslogv3.HTTPRequestProperties{Path: "/" + long, RequestId: long}
	e.CommonProperties.CustomTags = map[string]string{tagEndpoint: long, tagTraceID: long, tagOperation: long, tagSpanID: long}
	e.CommonProperties.StartTime = &timestamppb.Timestamp{Seconds: 1 << 60}
	f := FlowOf(e, &corev3.Node{Id: long})
	data, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) > 8<<10 || !f.Time.IsZero() {
		t.Errorf("a flow of %d bytes at %s", len(data), f.Time)
	}
	if f := FlowOf(nil, nil); f.Verdict != telemetry.Refused {
		t.Errorf("nothing is %s", f.Verdict)
	}
}

func FuzzTLSFailure(f *testing.F) {
	f.Add("TLS_error:|268435581:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:TLS_error_end")
	f.Add("TLS_error|error:1000009c:SSL routines:OPENSSL_internal:HTTP_REQUEST:TLS_error_end")
	f.Fuzz(func(t *testing.T, raw string) {
		if raw != "" && tlsFailure(raw) == "" && !strings.Contains(raw, "OPENSSL_internal:") {
			t.Errorf("%q lost its reason", raw)
		}
	})
}

// A call of gRPC has status 200 whatever became of it; its own status tells.
func TestStatusOfGRPC(t *testing.T) {
	entry := func(code string) *accesslogv3.HTTPAccessLogEntry {
		return &accesslogv3.HTTPAccessLogEntry{
			CommonProperties: &accesslogv3.AccessLogCommon{
				CustomTags: map[string]string{"grpc_status": code},
				Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
					rbacMetadata: {Fields: map[string]*structpb.Value{"enforced_engine_result": structpb.NewStringValue("allowed")}},
					ourMetadata:  {Fields: map[string]*structpb.Value{"beyond": structpb.NewStringValue("on everything here, which field 14 of the message asks for")}},
				}},
			},
			Response: &accesslogv3.HTTPResponseProperties{ResponseCode: wrapperspb.UInt32(200)},
		}
	}
	for code, want := range map[string]int{"0": 200, "-": 200, "": 200, "3": 400, "7": 403, "14": 503, "16": 401, "17": 500, "-1": 500, "x": 500} {
		f := FlowOf(entry(code), nil)
		if f.Status != want || (f.Verdict == telemetry.Failed) != (want >= 500) {
			t.Errorf("%q is recorded as %d, %s", code, f.Status, f.Verdict)
		}
		if !strings.HasPrefix(f.Detail, "asks for everything here, which field 14") {
			t.Errorf("the flow says %q", f.Detail)
		}
	}
}
