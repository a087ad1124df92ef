package real

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/budget"
	"sallyport.dev/budget/local"
	"sallyport.dev/telemetry"
)

// spender is a backend that does what the model's name says: "usage-7" answers, and says that it took so many tokens.
type spender struct {
	server *httptest.Server
	served chan string  // the models that it was asked for and whose answers it will not end
	worked atomic.Int64 // tokens that it has reported
}

func newSpender(t testing.TB) *spender {
	s := &spender{served: make(chan string, 1000)}
	s.server = httptest.NewServer(s)
	t.Cleanup(func() {
		s.server.CloseClientConnections()
		s.server.Close()
	})
	return s
}

func (s *spender) address() string { return s.server.Listener.Addr().String() }

func (s *spender) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	var asked struct{ Model string }
	_ = json.Unmarshal(body, &asked)
	what, number, _ := strings.Cut(asked.Model, "-")
	n, _ := strconv.Atoi(number)
	events := func() {
		w.Header().Set("content-type", "text/event-stream")
		for range n {
			_, _ = io.WriteString(w, "data: {\"choices\":[{\"delta\":{\"content\":\"word\"}}]}\n\n")
			_ = http.NewResponseController(w).Flush()
		}
	}
	switch what {
	case "usage":
		w.Header().Set("content-type", "application/json")
		fmt.Fprintf(w, `{"object":"chat.completion","model":"m","choices":[],"usage":{"prompt_tokens":10,"completion_tokens":%d,"total_tokens":%d}}`, n, n+10)
		s.worked.Add(int64(n + 10))
	case "silent":
		w.Header().Set("content-type", "application/json")
		_, _ = io.WriteString(w, `"`+strings.Repeat("x", n-2)+`"`)
	case "error":
		http.Error(w, "broken", n)
	case "stream":
		events()
	case "told": // with usage at its end
		events()
		fmt.Fprintf(w, "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":10,\"completion_tokens\":%d}}\n\n", n)
	case "hang": // in the middle of a stream
		events()
		s.served <- asked.Model
		<-r.Context().Done()
	case "abort":
		events()
		s.served <- asked.Model
		panic(http.ErrAbortHandler)
	case "mute":
		s.served <- asked.Model
		<-r.Context().Done()
	}
}

// budgeted is a grant with a budget, to everybody below /team.
func budgeted(name, endpoint, operations, terms string) string {
	return strings.TrimSuffix(grant(name, "/"+name+"/*", endpoint, operations, "'*'"), "\n") + "\n  budget: {" + terms + "}\n"
}

func budgetDocuments(s *spender) string {
	return endpoint("chat", "OpenAI", s.address()) + endpoint("claude", "Anthropic", s.address()) + endpoint("gemini", "Gemini", s.address()) +
		endpoint("calls", "GRPC", s.address()) +
		grant("free", "/free/*", "chat", "Infer", "'*'") +
		budgeted("few", "chat", "Infer", "requests: {max: 3, per: Month}") +
		budgeted("some", "claude", "Infer", "requests: {max: 1, per: Month}") +
		budgeted("more", "gemini", "Infer", "requests: {max: 1, per: Month}") +
		budgeted("rpc", "calls", "Call", "requests: {max: 1, per: Month}") +
		budgeted("often", "chat", "Infer", "requests: {max: 1, per: Minute}") +
		budgeted("tokens", "chat", "Infer, Embed", "tokens: {max: 100000, per: Month}") +
		budgeted("both", "chat", "Infer", "requests: {max: 1000, per: Month}, tokens: {max: 1000, per: Month}, scope: Shared") +
		budgeted("open", "chat", "Infer", "requests: {max: 3, per: Month}, whenUnavailable: Allow")
}

// sized is a body of so many bytes.
func sized(n int, model, more string) string {
	body := fmt.Sprintf(`{"model":%q%s,"messages":[],"user":""}`, model, more)
	return strings.Replace(body, `"user":""`, `"user":"`+strings.Repeat("x", n-len(body))+`"`, 1)
}

// balance is how an account stands, by the gateway's file.
func (u *up) balance(t testing.TB, grant string, unit budget.Unit) (b budget.Balance) {
	t.Helper()
	all, err := local.ReadFile(filepath.Join(u.state, "budgets"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range all {
		if string(b.Grant) == grant && b.Unit == unit {
			return b
		}
	}
	return b
}

// settles waits until a grant's tokens are what they should be.
func (u *up) settles(t testing.TB, what, grant string, want int64) {
	t.Helper()
	var b budget.Balance
	deadline := time.Now().Add(patience)
	for b = u.balance(t, grant, budget.Tokens); b.Used != want; b = u.balance(t, grant, budget.Tokens) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: %d tokens are used, want %d", what, b.Used, want)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestBudgetOfRequests ends at its bound, says so as the protocols do, and leaves all others alone.
func TestBudgetOfRequests(t *testing.T) {
	t.Parallel()
	u := startUp(t, map[string]string{"all.yaml": budgetDocuments(newSpender(t))})
	for _, v := range []version{http1, http2} {
		who := u.as(t, "/few/"+string(v[5]), v)
		for i := range 3 {
			if a := who.chat(t, "chat", "usage-1"); a.status != 200 || a.header.Get("x-ratelimit-remaining-requests") != strconv.Itoa(2-i) {
				t.Fatalf("request %d: %v %v", i, a, a.header)
			}
		}
		a := who.chat(t, "chat", "usage-1")
		p := wantProblem(t, a, 429, "rate_limit_exceeded")
		if !strings.HasPrefix(p.Error.Message, "grant/few has 3 requests a month for a caller: 3 are taken") || p.Error.Type != "rate_limit_error" {
			t.Errorf("over the budget: %+v", p)
		}
		if h := a.header; h.Get("retry-after") == "" || h.Get("x-ratelimit-limit-requests") != "3" || h.Get("x-ratelimit-remaining-requests") != "0" ||
			h.Get("x-should-retry") != "false" || !strings.HasPrefix(h.Get("ratelimit"), `"requests";r=0;t=`) || !strings.HasPrefix(h.Get("ratelimit-policy"), `"requests";q=3;w=`) {
			t.Errorf("over the budget: %v", h)
		}
		if f := u.flow(t, a); f.Verdict != telemetry.Limited || f.Rule != "grant/few" || f.Status != 429 || f.Detail != "over its budget" {
			t.Errorf("recorded as %+v", f)
		}
	}
	free := u.as(t, "/free/a", http2)
	for range 5 {
		if a := free.chat(t, "chat", "usage-1"); a.status != 200 || a.header.Get("x-ratelimit-limit-requests") != "" {
			t.Errorf("without a budget: %v %v", a, a.header)
		}
	}
	if a := u.as(t, "/few/1", http2).send(t, request{method: "GET", host: hostOf("chat"), path: "/v1/models"}); a.status == 429 {
		t.Errorf("a list is counted: %v", a)
	}
	// A window that is over soon is worth waiting for.
	often, last := u.as(t, "/often/a", http2), answer{}
	eventually(t, "end of a minute's budget", func() bool { last = often.chat(t, "chat", "usage-1"); return last.status == 429 })
	if n, err := strconv.Atoi(last.header.Get("retry-after")); err != nil || n < 1 || n > 60 || last.header.Get("x-should-retry") != "" {
		t.Errorf("a minute's budget: %v", last.header)
	}

	// Everybody reads it in their own words.
	for _, c := range []struct{ who, endpoint, path, body, want string }{
		{"/some/a", "claude", "/v1/messages", `{"model":"usage-1","max_tokens":5,"messages":[]}`, `"type":"rate_limit_error"`},
		{"/more/a", "gemini", "/v1beta/models/usage-1:generateContent", `{"contents":[]}`, `"status":"RESOURCE_EXHAUSTED"`},
	} {
		who := u.as(t, c.who, http2)
		if a := who.post(t, c.endpoint, c.path, c.body); a.status == 429 {
			t.Errorf("%s: %v", c.endpoint, a)
		}
		if a := who.post(t, c.endpoint, c.path, c.body); a.status != 429 || !strings.Contains(a.body, c.want) {
			t.Errorf("%s: %v", c.endpoint, a)
		}
	}
	conn := u.grpcAs(t, "/rpc/a", "calls")
	if s := status.Convert(call(t, conn, "/a.B/C", nil)); s.Code() == codes.ResourceExhausted {
		t.Errorf("gRPC: %v", s)
	}
	if s := status.Convert(call(t, conn, "/a.B/C", nil)); s.Code() != codes.ResourceExhausted || !strings.HasPrefix(s.Message(), "grant/rpc has 1 requests a month") {
		t.Errorf("gRPC: %v", s)
	}

	out, _, code := u.ask(t, "budgets", "--grant", "few", "--caller", domain+"/few/*", "-o", "json")
	var shown []struct {
		Caller          string
		Used, Remaining int64
	}
	if err := json.Unmarshal([]byte(out), &shown); err != nil || code != 0 || len(shown) != 2 || shown[0].Caller != domain+"/few/1" || shown[0].Used != 3 || shown[0].Remaining != 0 {
		t.Errorf("budgets: %d %s", code, out)
	}
	if out, _, _ := u.ask(t, "explain", "--caller", domain+"/few/1", "--endpoint", "chat", "--operation", "Infer", "--resource", "m"); !strings.Contains(out, "counted against a budget of the caller's own: requests=3/Month") {
		t.Errorf("explain: %s", out)
	}
}

// TestBudgetIsHard has many ask at once: never more than the bound is given, be it for one caller or for all together.
func TestBudgetIsHard(t *testing.T) {
	t.Parallel()
	s := newSpender(t)
	u := startUp(t, map[string]string{"all.yaml": endpoint("chat", "OpenAI", s.address()) +
		budgeted("few", "chat", "Infer", "requests: {max: 20, per: Month}") +
		budgeted("all", "chat", "Infer", "tokens: {max: 3000, per: Month}, scope: Shared")})
	together := func(who func(i int) *caller, ask func(*caller) answer) (given int64) {
		var group sync.WaitGroup
		var allowed atomic.Int64
		for i := range 50 {
			c := who(i)
			group.Go(func() {
				for range 3 {
					switch a := ask(c); a.status {
					case 200:
						allowed.Add(1)
					case 429:
					default:
						t.Errorf("%v", a)
					}
				}
			})
		}
		group.Wait()
		return allowed.Load()
	}
	one := u.as(t, "/few/a", http2)
	if n := together(func(int) *caller { return one }, func(c *caller) answer { return c.chat(t, "chat", "usage-1") }); n != 20 {
		t.Errorf("%d of 20 requests were let through", n)
	}
	s.worked.Store(0)
	two := []*caller{u.as(t, "/all/a", http2), u.as(t, "/all/b", http1)}
	n := together(func(i int) *caller { return two[i%2] }, func(c *caller) answer {
		return c.post(t, "chat", chatPath, sized(100, "usage-90", `,"max_tokens":90`))
	})
	if used := s.worked.Load(); used > 3000 || n < 3000/190 || used != 100*n { // at first each takes 190
		t.Errorf("%d requests used %d of 3000 tokens", n, used)
	}
	u.settles(t, "what was used", "all", s.worked.Load())
}

// TestBudgetOfTokens counts what was reported or, where nothing is, what was seen.
func TestBudgetOfTokens(t *testing.T) {
	t.Parallel()
	s := newSpender(t)
	u := startUp(t, map[string]string{"all.yaml": budgetDocuments(s)})
	who, before := u.as(t, "/tokens/a", http2), int64(0)
	for _, c := range []struct {
		model, more string
		want        int64
	}{
		{"usage-7", `,"max_tokens":50`, 17},                                         // what was reported
		{"usage-500", `,"max_tokens":50`, 510},                                      // even if it is more
		{"silent-20", `,"max_tokens":50`, 320},                                      // what can have been sent
		{"silent-20000", `,"max_tokens":50`, 350},                                   // and no more than the request allows
		{"silent-20000", ``, 20_300},                                                // if it does
		{"silent-20000", `,"max_tokens":50,"n":3`, 450},                             // of each answer
		{"silent-20000", `,"max_tokens":50,"max_completion_tokens":60`, 360},        // the largest that any server can take for it
		{"silent-20000", `,"max_tokens":50,"Max_Tokens":70,"max_tokens":20`, 370},   // whichever of them counts
		{"silent-20000", `,"max_tokens":50,"n_predict":80`, 380},                    // llama.cpp prefers that
		{"error-500", `,"max_tokens":50`, 0},                                        // nothing came of it
		{"stream-20", `,"max_tokens":50,"stream":true`, 320},                        // an event is a token
		{"stream-20", ``, 320},                                                      // here too
		{"told-20", `,"max_tokens":50,"stream":true`, 30},                           // usage in a stream
		{"stream-20", `,"max_tokens":"50"`, 320},                                    // said in a way that not all understand
		{"stream-20", `,"n_predict":1`, 320},                                        // or that some ignore
		{"stream-20", `,"max_output_tokens":1,"MAX_TOKENS":1`, 320},                 // the same
		{"stream-20", `,"max_tokens":1,"n":2.0`, 320},                               // the same
		{"stream-20", `,"max_tokens":1,"max_tokens":-1`, 320},                       // the same
		{"stream-20", `,"max_tokens":1`, 301},                                       // can't be more
		{"stream-20", `,"max_tokens":1,"n":null,"max_completion_tokens":null`, 301}, // nor here
	} {
		a := who.post(t, "chat", chatPath, sized(300, c.model, c.more))
		if a.status != 200 && a.status != 500 || a.header.Get("x-ratelimit-limit-tokens") != "100000" {
			t.Fatalf("%s: %v %v", c.model, a, a.header)
		}
		u.settles(t, c.model+c.more, "tokens", before+c.want)
		before += c.want
	}
	// Several answers for one request.
	for body, want := range map[string]int64{`"prompt":["a","b",["c",","]]`: 3, `"prompt":[1,2,3]`: 1, `"prompt":"a, b"`: 1, `"prompt":["a"],"best_of":2`: 2} {
		body = `{"model":"silent-20000","max_tokens":50,` + body + `}`
		if a := who.post(t, "chat", "/v1/completions", body); a.status != 200 {
			t.Fatal(a)
		}
		want = before + int64(len(body)) + 50*want
		u.settles(t, body, "tokens", want)
		before = want
	}
	body := `{"model":"silent-20000","input":"hello"}`
	if a := who.post(t, "chat", "/v1/embeddings", body); a.status != 200 {
		t.Fatal(a)
	}
	u.settles(t, "embeddings", "tokens", before+int64(len(body)))

	// One account for all, and two units at once: a request that has too many tokens takes no request either.
	a := u.as(t, "/both/a", http1).post(t, "chat", chatPath, sized(100, "usage-7", `,"max_tokens":2000`))
	wantProblem(t, a, 429, "rate_limit_exceeded")
	if a.header.Get("retry-after") != "" || a.header.Get("x-should-retry") != "false" || !strings.Contains(a.body, "state a smaller max_tokens") {
		t.Errorf("more than there ever is: %v %v", a, a.header)
	}
	if a := u.as(t, "/both/b", http2).post(t, "chat", chatPath, sized(100, "usage-790", `,"max_tokens":800`)); a.status != 200 || a.header.Get("x-ratelimit-remaining-requests") != "999" {
		t.Errorf("%v %v", a, a.header)
	}
	u.settles(t, "what was reported", "both", 800)
	if a := u.as(t, "/both/a", http2).post(t, "chat", chatPath, sized(100, "usage-7", `,"max_tokens":200`)); a.status != 429 || a.header.Get("x-ratelimit-remaining-tokens") != "200" {
		t.Errorf("%v %v", a, a.header)
	}
}

// TestBudgetOfCutStreams settles by what was seen; what nobody tells about stays taken. And no restart forgets anything.
func TestBudgetOfCutStreams(t *testing.T) {
	t.Parallel()
	s := newSpender(t)
	u := startUp(t, map[string]string{"all.yaml": budgetDocuments(s)})
	before := int64(0)
	// begin asks, and reads so many events.
	begin := func(who *caller, model string, events int) (leave func()) {
		ctx, cancel := context.WithCancel(t.Context())
		req, err := request{host: hostOf("chat"), path: chatPath, body: strings.NewReader(sized(100, model, `,"max_tokens":500`))}.build(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if events == 0 {
			go func() { <-s.served; cancel() }()
			resp, err := who.client.Do(req)
			if err == nil {
				resp.Body.Close()
			}
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", model, err)
			}
			return cancel
		}
		resp, err := who.client.Do(req) //nolint:bodyclose // by the test, when it leaves
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(resp.Body)
		for range 2 * events {
			if !lines.Scan() {
				t.Fatalf("%s: %v", model, lines.Err())
			}
		}
		<-s.served
		return func() {
			cancel()
			resp.Body.Close()
		}
	}
	for _, v := range []version{http1, http2} {
		who := u.as(t, "/tokens/a", v)
		for _, c := range []struct {
			what, model string
			events      int
			want        int64
		}{{"after 30 events", "hang-30", 30, 130}, {"before there was an answer", "mute", 0, 600}, {"by the backend", "abort-20", 20, 120}} {
			begin(who, c.model, c.events)()
			u.settles(t, "cut "+c.what, "tokens", before+c.want)
			before += c.want
		}
	}
	// Envoy is killed, and then all of it: what is held stays taken, and is remembered.
	begin(u.as(t, "/tokens/a", http2), "hang-3", 3)
	if err := syscall.Kill(u.envoy(t), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another Envoy", func() bool { return u.as(t, "/few/a", http2).chat(t, "chat", "usage-1").status == 200 })
	u.settles(t, "Envoy was killed", "tokens", before+600)
	few := u.balance(t, "few", budget.Requests).Used
	u.kill()
	if b := u.balance(t, "tokens", budget.Tokens); b.Used != before+600 || u.balance(t, "few", budget.Requests).Used != few {
		t.Errorf("killed: %+v", b)
	}
	u.mustLaunch(t)
	leave := begin(u.as(t, "/tokens/a", http2), "hang-3", 3)
	defer leave()
	u.settles(t, "what is held", "tokens", before+1200)
	// Told to end, it settles what it ends.
	if err := u.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-u.exit
	if b := u.balance(t, "tokens", budget.Tokens); b.Used != before+703 && b.Used != before+1200 { // Envoy need not report it in time
		t.Errorf("ended: %+v", b)
	}
	u.mustLaunch(t)
	who := u.as(t, "/few/a", http2)
	for range 3 - few {
		if a := who.chat(t, "chat", "usage-1"); a.status != 200 {
			t.Error(a)
		}
	}
	wantProblem(t, who.chat(t, "chat", "usage-1"), 429, "rate_limit_exceeded")
}

// TestBudgetOfOpenAI has the official client ask. It comes again when it is told that there will be more soon.
func TestBudgetOfOpenAI(t *testing.T) {
	t.Parallel()
	python, _ := filepath.Abs("../../.parts/venv/bin/python")
	if _, err := exec.LookPath(python); err != nil {
		t.Fatal("this test needs Python with the official client: run `make parts`")
	}
	s := newSpender(t)
	u := startUp(t, map[string]string{"all.yaml": budgetDocuments(s)})
	run := func(who string) string {
		folder := t.TempDir()
		u.writePEM(t, folder, who)
		out, _ := exec.CommandContext(t.Context(), python, "testdata/budget.py", hostOf("chat"), u.listen, folder, "usage-7", "300").CombinedOutput()
		return strings.TrimSpace(string(out)) // which shows an error, too
	}
	for range 3 {
		u.as(t, "/few/a", http2).chat(t, "chat", "usage-1")
	}
	if said := run("/few/a"); said != "RateLimitError 429 rate_limit_exceeded rate_limit_error 0 True" {
		t.Error(said)
	}
	if n := len(u.flows(t, 4, func(f telemetry.Flow) bool { return f.Rule == "grant/few" })); n != 4 {
		t.Errorf("it asked %d times", n-3)
	}
	// Somebody else holds nearly all of it, for now.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := request{host: hostOf("chat"), path: chatPath, body: strings.NewReader(sized(100, "hang-1", `,"max_tokens":800`))}.build(ctx)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := u.as(t, "/both/b", http2).client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	said := make(chan string, 1)
	go func() { said <- run("/both/a") }()
	u.flows(t, 1, func(f telemetry.Flow) bool { return f.Verdict == telemetry.Limited && f.Rule == "grant/both" })
	cancel()
	if said := <-said; said != "answered" {
		t.Error(said)
	}
}

// TestBudgetsInRedis are one for two gateways. While it is away, each grant's own word counts.
func TestBudgetsInRedis(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	s := newSpender(t)
	documents := map[string]string{"all.yaml": budgetDocuments(s)}
	one, other := startUp(t, documents, "--budget-redis", redis.url), startUp(t, documents, "--budget-redis", redis.url)
	statuses := func(u *up, who string, n int) (all []int) {
		for range n {
			a := u.as(t, who, http2).chat(t, "chat", "usage-1")
			if all = append(all, a.status); a.status == 503 {
				wantProblem(t, a, 503, "budget_unavailable")
			}
		}
		return all
	}
	got := fmt.Sprint(statuses(one, "/few/a", 2), statuses(other, "/few/a", 2), statuses(one, "/few/a", 1), statuses(other, "/few/b", 1))
	if got != "[200 200] [200 429] [429] [200]" {
		t.Error(got)
	}
	if out, _, code := runProgram(t, "budgets", "--budget-redis", redis.url, "--grant", "few", "--caller", domain+"/few/a"); code != 0 || !strings.Contains(out, domain+"/few/a  requests  3     0     0     3 a month") {
		t.Errorf("%d %s", code, out)
	}
	// It hangs; then even the gate does; then Redis is gone.
	for _, stopped := range []int{redis.cmd.Process.Pid, one.cmd.Process.Pid} {
		if err := syscall.Kill(stopped, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(statuses(one, "/few/b", 1), statuses(one, "/free/a", 1)); got != "[503] [200]" {
			t.Errorf("when it hangs: %s", got)
		}
		if err := syscall.Kill(stopped, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	redis.stop()
	if got := fmt.Sprint(statuses(one, "/few/b", 1), statuses(one, "/open/a", 5), statuses(one, "/free/a", 1)); got != "[503] [200 200 200 200 200] [200]" {
		t.Errorf("without Redis: %s", got)
	}
	if f := one.flows(t, 1, func(f telemetry.Flow) bool { return f.Status == 503 })[0]; f.Verdict != telemetry.Limited || f.Detail != "its budget can't be counted" {
		t.Errorf("recorded as %+v", f)
	}
	redis.start()
	eventually(t, "Redis again", func() bool { return statuses(one, "/few/c", 1)[0] != 503 })
	if got := fmt.Sprint(statuses(one, "/open/b", 5)); got != "[200 200 200 429 429]" {
		t.Errorf("with Redis again: %s", got)
	}
}

// redis is a real server.
type redis struct {
	t           testing.TB
	url, binary string
	address     string
	cmd         *exec.Cmd
}

func startRedis(t testing.TB) *redis {
	binary, err := exec.LookPath("redis-server")
	for _, path := range []string{"../../.parts/bin/redis-server", os.Getenv("REDIS_SERVER")} { // the last that is there
		if found, err := exec.LookPath(path); err == nil {
			binary = found
		}
	}
	if binary == "" {
		t.Fatalf("this test needs redis-server (`make clients`, or set $REDIS_SERVER): %v", err)
	}
	r := &redis{t: t, binary: binary, address: freeAddress()}
	r.url = "redis://" + r.address + "/0"
	r.start()
	t.Cleanup(r.stop)
	return r
}

func (r *redis) start() {
	r.t.Helper()
	_, port, _ := net.SplitHostPort(r.address)
	r.cmd = exec.Command(r.binary, "--bind", "127.0.0.1", "--port", port, "--save", "", "--dir", r.t.TempDir())
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := start(r.cmd); err != nil {
		r.t.Fatal(err)
	}
	eventually(r.t, "Redis", func() bool {
		conn, err := net.Dial("tcp", r.address)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

func (r *redis) stop() {
	if r.cmd != nil {
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait()
		r.cmd = nil
	}
}
