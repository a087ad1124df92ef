package real

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport.dev/controlplane/envoy"
	"sallyport.dev/telemetry"
)

func zipped(s string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = io.WriteString(w, s)
	_ = w.Close()
	return b.String()
}

// ambiguous are bodies that two parsers could read differently, or that are no JSON object at all.
var ambiguous = []struct{ name, body string }{
	{"empty", ``},
	{"blank", " \n"},
	{"duplicate key", `{"model":"m","model":"other"}`},
	{"duplicate key, the same value", `{"model":"m","model":"m"}`},
	{"duplicate key behind a deep value", `{"model":"m","a":{"b":[{}]},"model":"other"}`},
	{"escaped key", `{"mod\u0065l":"other"}`},
	{"escaped key beside a plain one", `{"model":"m","mod\u0065l":"other"}`},
	{"escaped key that is another", `{"model":"m","\u0061":1}`},
	{"key in another case", `{"Model":"m"}`},
	{"key in another case beside", `{"model":"m","MODEL":"other"}`},
	{"escape in the name", `{"model":"\u006d"}`},
	{"name with a quote", `{"model":"m\""}`},
	{"empty name", `{"model":""}`},
	{"long name", `{"model":"` + strings.Repeat("m", 257) + `"}`},
	{"name is a number", `{"model":1}`},
	{"name is null", `{"model":null}`},
	{"name is an array", `{"model":["m"]}`},
	{"name is an object", `{"model":{"model":"m"}}`},
	{"no name", `{"messages":[]}`},
	{"name deeper", `{"a":{"model":"m"}}`},
	{"name that climbs", `{"model":"m/../other"}`},
	{"name with an empty segment", `{"model":"m//other"}`},
	{"too many values", `{"model":"m","a":[` + strings.Repeat("1,", 250_000) + `1]}`},
	{"the wrong bracket", `{"model":"m","a":{]}`},
	{"arrays and objects, 65 deep", `{"model":"m","a":` + strings.Repeat(`[{"a":`, 32) + "1" + strings.Repeat("}]", 32) + `}`},
	{"half of a surrogate pair, then no half", `{"model":"m","a":"\ud800\ue000"}`},
	{"escape with a sign", `{"model":"m","a":"\u+041"}`},
	{"byte order mark", "\ufeff" + `{"model":"m"}`},
	{"UTF-16", "\xff\xfe{\x00\"\x00m\x00"},
	{"gzip", zipped(`{"model":"m"}`)},
	{"trailing bytes", `{"model":"m"} x`},
	{"second object", `{"model":"m"}{"model":"other"}`},
	{"trailing NUL", "{\"model\":\"m\"}\x00"},
	{"leading NUL", "\x00{\"model\":\"m\"}"},
	{"leading form feed", "\f{\"model\":\"m\"}"},
	{"no-break space between", "{\u00a0\"model\":\"m\"}"},
	{"comment", `{"model":"m"/*,"model":"other"*/}`},
	{"line comment", "{\"model\":\"m\"} // x"},
	{"single quotes", `{'model':'m'}`},
	{"key without quotes", `{model:"m"}`},
	{"trailing comma", `{"model":"m",}`},
	{"leading comma", `{,"model":"m"}`},
	{"two commas", `{"model":"m",,"a":1}`},
	{"trailing comma in an array", `{"model":"m","a":[1,]}`},
	{"no colon", `{"model" "m"}`},
	{"two colons", `{"model"::"m"}`},
	{"not closed", `{"model":"m"`},
	{"closed twice", `{"model":"m"}}`},
	{"closed as an array", `{"model":"m","a":[1}]`},
	{"string not closed", `{"model":"m`},
	{"array", `[{"model":"m"}]`},
	{"string", `"model"`},
	{"number", `1`},
	{"null", `null`},
	{"form", `model=m`},
	{"NaN", `{"model":"m","temperature":NaN}`},
	{"Infinity", `{"model":"m","temperature":-Infinity}`},
	{"leading zero", `{"model":"m","n":01}`},
	{"plus", `{"model":"m","n":+1}`},
	{"hexadecimal", `{"model":"m","n":0x1}`},
	{"no digit behind the point", `{"model":"m","n":1.}`},
	{"no digit before the point", `{"model":"m","n":.5}`},
	{"no exponent", `{"model":"m","n":1e}`},
	{"True", `{"model":"m","stream":True}`},
	{"truth", `{"model":"m","stream":truth}`},
	{"undefined", `{"model":"m","stream":undefined}`},
	{"UTF-8 that ends early", "{\"model\":\"m\",\"a\":\"\xc3\"}"},
	{"UTF-8 too long", "{\"model\":\"m\",\"a\":\"\xc0\xaf\"}"},
	{"UTF-8 surrogate", "{\"model\":\"m\",\"a\":\"\xed\xa0\x80\"}"},
	{"UTF-8 beyond the end", "{\"model\":\"m\",\"a\":\"\xf4\x90\x80\x80\"}"},
	{"Latin-1", "{\"model\":\"m\",\"a\":\"\xe9\"}"},
	{"bad UTF-8 in a key", "{\"model\":\"m\",\"\xff\":1}"},
	{"bad UTF-8 in the name", "{\"model\":\"m\xff\"}"},
	{"lone high surrogate", `{"model":"m","a":"\ud800"}`},
	{"lone low surrogate", `{"model":"m","a":"\udc00"}`},
	{"surrogates the wrong way round", `{"model":"m","a":"\udc00\ud800"}`},
	{"unknown escape", `{"model":"m","a":"\x41"}`},
	{"escape cut short", `{"model":"m","a":"\u00"}`},
	{"control character in a string", "{\"model\":\"m\",\"a\":\"\x01\"}"},
	{"new line in a string", "{\"model\":\"m\",\"a\":\"\n\"}"},
	{"tab in a key", "{\"model\":\"m\",\"\t\":1}"},
	{"too deep", `{"model":"m","a":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + `}`},
	{"much too deep", `{"model":"m","a":` + strings.Repeat("[", 1<<20)},
}

// exactly are bodies that look odd and are plain JSON: they reach the backend as they are.
var exactly = []struct{ name, body string }{
	{"a number beyond float64", `{"model":"m","a":1e400}`},
	{"keys that only look like it", "{\"model\":\"m\",\"\ufeffmodel\":\"o\",\"\u217fodel\":\"o\"}"},
	{"plain", `{"model":"m"}`},
	{"white space", " \t\r\n{ \"model\"\n:\t\"m\" , \"a\" : [ ] } \r\n"},
	{"numbers", `{"model":"m","n":[0,-0,1e1,1E+1,1.50,-1.0e-5,123456789012345678901234567890]}`},
	{"escapes", `{"model":"m","a":"\u00e9\ud83d\ude00\/\"\\\b\f\n\r\t\u0000"}`},
	{"text", `{"model":"m","a":"é😀\u2028 straße 漢字"}`},
	{"key behind", `{"a":{"model":"other"},"b":[{"model":"other"}],"model":"m"}`},
	{"other keys twice", `{"model":"m","a":1,"a":2}`},
	{"deep keys with escapes", `{"model":"m","a":{"\u0061":1}}`},
	{"name with blanks", `{"model":"my model (q4) é"}`},
	{"name as long as can be", `{"model":"` + strings.Repeat("m", 256) + `"}`},
	{"as deep as can be", `{"model":"m","a":` + strings.Repeat("[", 63) + strings.Repeat("]", 63) + `}`},
	{"literals", `{"model":"m","a":[true,false,null,"",{}]}`},
	{"DEL", "{\"model\":\"m\",\"a\":\"\x7f\"}"},
	{"a megabyte", `{"model":"m","a":"` + strings.Repeat("x", 1<<20) + `"}`},
}

// ways are all the ways to send a body.
var ways = []struct {
	name    string
	version version
	send    func(body string) request
}{
	{"HTTP/1.1", http1, func(b string) request { return request{body: strings.NewReader(b)} }},
	{"HTTP/2", http2, func(b string) request { return request{body: strings.NewReader(b)} }},
	{"HTTP/1.1 in chunks of one byte", http1, func(b string) request { return request{body: inPieces(b, 1)} }},
	{"HTTP/1.1 in chunks of 7 bytes", http1, func(b string) request { return request{body: inPieces(b, 7)} }},
	{"HTTP/1.1 in chunks of 1000 bytes", http1, func(b string) request { return request{body: inPieces(b, 1000)} }},
	{"HTTP/2 in frames of one byte", http2, func(b string) request { return request{body: inPieces(b, 1)} }},
	{"HTTP/2 in frames of 7 bytes", http2, func(b string) request { return request{body: inPieces(b, 7)} }},
	{"HTTP/2 in frames of 1000 bytes", http2, func(b string) request { return request{body: inPieces(b, 1000)} }},
	{"HTTP/1.1 in chunks with Expect", http1, func(b string) request {
		return request{body: inPieces(b, 7), header: http.Header{"Expect": {"100-continue"}}}
	}},
	{"HTTP/1.1 with Expect", http1, func(b string) request {
		return request{body: strings.NewReader(b), header: http.Header{"Expect": {"100-continue"}}}
	}},
	{"HTTP/2 with Expect", http2, func(b string) request {
		return request{body: strings.NewReader(b), header: http.Header{"Expect": {"100-continue"}}}
	}},
}

// mostPieces is how many a body is sent in.
const mostPieces = 5000

// pieces is a body that comes in pieces, of a length that nobody is told.
type pieces struct {
	rest string
	size int
}

func inPieces(body string, size int) io.Reader {
	return &pieces{body, max(size, len(body)/mostPieces)}
}

func (p *pieces) Read(into []byte) (int, error) {
	if p.rest == "" {
		return 0, io.EOF
	}
	n := copy(into, p.rest[:min(p.size, len(p.rest))])
	p.rest = p.rest[n:]
	return n, nil
}

func TestBodies(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "bodies")
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			who := u.as(t, "/bodies", way.version)
			send := func(body string) answer {
				r := way.send(body)
				r.host, r.path = hostOf("bodies"), "/v1/chat/completions"
				return who.send(t, r)
			}
			for _, c := range ambiguous {
				a := send(c.body)
				p := wantProblem(t, a, http.StatusBadRequest, "ambiguous_request")
				if t.Failed() {
					t.Fatalf("%s: %v", c.name, a)
				}
				if p.Error.Type != "invalid_request_error" || !strings.HasPrefix(p.Error.Message, "The request has ") {
					t.Errorf("%s: %v", c.name, a)
				}
			}
			if got := b.taken(); len(got) > 0 {
				t.Errorf("the backend was asked: %.300v", got)
			}
			for _, c := range exactly {
				a := send(c.body)
				got := b.taken()
				if a.status != http.StatusOK || len(got) != 1 || got[0].body != c.body {
					t.Errorf("%s: answer %v, backend got %.300v", c.name, a, got)
				}
			}
		})
	}
	t.Run("flow", func(t *testing.T) {
		a := u.as(t, "/bodies", http2).post(t, "bodies", "/v1/chat/completions", `{"model":"m","model":"m"}`)
		if f := u.flow(t, a); f.Verdict != telemetry.Refused || f.Detail != `more than one "model"` || f.Status != 400 {
			t.Errorf("recorded as %+v", f)
		}
	})
}

// TestEncodedBodies refuses bodies that say that they are to be decoded first: what is read here is not what the
// backend would read.
func TestEncodedBodies(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "encoded")
	for _, v := range []version{http1, http2} {
		who := u.as(t, "/encoded", v)
		for _, encoding := range []string{"gzip", "deflate", "br", "zstd", "x", "identity", "identity, gzip"} {
			a := who.send(t, request{host: hostOf("encoded"), path: "/v1/chat/completions", body: strings.NewReader(`{"model":"m"}`),
				header: http.Header{"Content-Encoding": {encoding}}})
			wantProblem(t, a, http.StatusBadRequest, "ambiguous_request")
		}
	}
	for charset, want := range map[string]int{
		"application/json": 200, "application/json; charset=utf-8": 200, `application/json; Charset="UTF-8"`: 200,
		"application/json; charset=utf-16le": 400, "application/json; charset=utf-8; charset=utf-7": 400, "text/plain; charset=utf-8, x; charset=ebcdic": 400,
	} {
		a := u.as(t, "/encoded", http1).send(t, request{host: hostOf("encoded"), path: "/v1/chat/completions", body: strings.NewReader(`{"model":"m"}`),
			header: http.Header{"Content-Type": {charset}}})
		if a.status != want {
			t.Errorf("%s: %d, want %d", charset, a.status, want)
		}
	}
	if got := b.taken(); len(got) != 3 {
		t.Errorf("the backend was asked: %+v", got)
	}
}

// TestLargeBodies reads bodies up to the limit and answers 413 beyond it.
func TestLargeBodies(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "large")
	const frame = len(`{"model":"m","a":""}`)
	body := func(size int) string { return `{"model":"m","a":"` + strings.Repeat("x", size-frame) + `"}` }
	for _, v := range []version{http1, http2} {
		t.Run(string(v), func(t *testing.T) {
			who := u.as(t, "/large", v)
			largest := body(envoy.MaxBodyBytes)
			if a := who.post(t, "large", "/v1/chat/completions", largest); a.status != http.StatusOK {
				t.Errorf("%d bytes: %v", len(largest), a)
			}
			if got := b.taken(); len(got) != 1 || got[0].body != largest {
				t.Errorf("the backend did not get the body as it was")
			}
			for _, over := range []int{1, 1 << 20} {
				a := who.post(t, "large", "/v1/chat/completions", body(envoy.MaxBodyBytes+over))
				wantProblem(t, a, http.StatusRequestEntityTooLarge, "request_too_large")
			}
			if got := b.taken(); len(got) > 0 {
				t.Errorf("the backend was asked")
			}
		})
	}
}

// TestSmuggling refuses requests of which it is not clear where they end.
func TestSmuggling(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "smuggling")
	const hidden = "POST /v1/chat/completions HTTP/1.1\r\nHost: smuggling.test.internal\r\nContent-Length: 15\r\n\r\n{\"model\":\"bad\"}"
	for _, header := range []string{
		"Content-Length: 13\r\nTransfer-Encoding: chunked",
		"Transfer-Encoding: chunked\r\nContent-Length: 13",
		"Content-Length: 13\r\nContent-Length: 14",
		"Content-Length: +13", "Content-Length: 13,13", "Content-Length: -1", "Content-Length: 0x0d",
		"Transfer-Encoding: xchunked", "Transfer-Encoding : chunked", "Transfer-Encoding: chunked, identity",
		"Content_Length: 13\r\nContent-Length: 13", "X-A: b\r\n Content-Length: 13", "X\x00: a\r\nContent-Length: 13",
	} {
		a := u.as(t, "/smuggling", http1).raw(t, hostOf("smuggling"),
			fmt.Sprintf("POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\n%s\r\n\r\n{\"model\":\"m\"}%s", hostOf("smuggling"), header, hidden))
		if a.status < 400 && a.err == nil {
			t.Errorf("%q: %v", header, a)
		}
	}
	if got := b.taken(); len(got) > 0 {
		t.Errorf("the backend was asked: %+v", got)
	}
}

// TestPipelining sends requests on one connection before the first is answered. Each is judged by its own body, wherever it
// begins and however the bytes come.
func TestPipelining(t *testing.T) {
	t.Parallel()
	u, b := shared(t, "pipelined")
	who := u.as(t, "/pipelined", http1)
	post := func(body string, chunk int, more string) string {
		head := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n%s", chatPath, hostOf("pipelined"), more)
		if chunk == 0 {
			return fmt.Sprintf("%sContent-Length: %d\r\n\r\n%s", head, len(body), body)
		}
		head += "Transfer-Encoding: chunked\r\n\r\n"
		for ; body != ""; body = body[min(chunk, len(body)):] {
			n := min(chunk, len(body))
			head += fmt.Sprintf("%x\r\n%s\r\n", n, body[:n])
		}
		return head + "0\r\n\r\n"
	}
	granted, denied, odd := `{"model":"m","messages":[]}`, `{"model":"o","messages":[]}`, `{"model":"m","model":"o"}`
	hidden := `{"model":"m","a":"` + strings.NewReplacer("\r\n", `\r\n`, `"`, `\"`).Replace(post(denied, 0, "")) + `"}`
	for _, chunk := range []int{0, 1, 7, 1000} {
		for _, expect := range []string{"", "Expect: 100-continue\r\n"} {
			for body, status := range map[string]int{denied: 403, odd: 400} {
				text := post(granted, chunk, expect) + post(hidden, chunk, expect) + post(granted, 0, "") + post(body, chunk, expect) + post(denied, chunk, expect)
				for _, size := range []int{1, 100, len(text)} {
					got, err := who.pipelined(t, hostOf("pipelined"), inPieces(text, size))
					if want := []int{200, 200, 200, status}; err != nil || !slices.Equal(got, want) {
						t.Errorf("chunks of %d, pieces of %d, %q: %v %v, want %v", chunk, size, expect, got, err, want)
					}
					var asked []string
					for _, r := range b.taken() {
						asked = append(asked, r.body)
					}
					if !slices.Equal(asked, []string{granted, hidden, granted}) {
						t.Errorf("chunks of %d, pieces of %d, %q: the backend got %q", chunk, size, expect, asked)
					}
				}
			}
		}
	}
}

// pipelined sends bytes in pieces and reads answers up to the first that is an error: Envoy closes behind it.
func (c *caller) pipelined(t *testing.T, sni string, text io.Reader) (statuses []int, err error) {
	t.Helper()
	conn, err := c.dial(t.Context(), sni)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = io.Copy(struct{ io.Writer }{conn}, text) // how much has come, the answers tell
	}()
	defer func() {
		conn.Close()
		<-sent
	}()
	r := bufio.NewReader(conn)
	for {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return statuses, err
		}
		if resp.StatusCode == http.StatusContinue {
			continue
		}
		if a := read(resp); a.err != nil {
			return statuses, a.err
		}
		if statuses = append(statuses, resp.StatusCode); resp.StatusCode != http.StatusOK {
			return statuses, nil
		}
	}
}
