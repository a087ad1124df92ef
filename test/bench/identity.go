package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// Identity is what identities cost. Times are in milliseconds, memory in MB.
type Identity struct {
	Rates   []*Rate `json:"rates"`
	Streams int     `json:"open_streams"` // of another workload, an SVID each, wherever it says so
	P50     float64 `json:"fetch_p50_ms"` // with them
	P99     float64 `json:"fetch_p99_ms"`
	// From the rename of a Workload document to the SVID that it leads to.
	Alone  []float64 `json:"pushed_alone_ms"`
	Beside []float64 `json:"pushed_beside_streams_ms"` // to one workload: these streams are another's
	All    []float64 `json:"pushed_to_all_ms"`         // to the last of these streams
	Plane  float64   `json:"plane_mb"`                 // more, for them
	Agent  float64   `json:"agent_mb"`                 // all of an agent with them
	Before float64   `json:"agent_mb_before"`          // and without
	// Forwarded is what the way through an agent adds, in parts of the median without it, round by round.
	Forwarded   []float64 `json:"forwarded_added"`
	ForwardedMS float64   `json:"forwarded_added_ms"`
}

const (
	openStreams = 1000
	fetches     = 1000
	pushes      = 9
	nodeName    = "bench" // of the agent
)

// workloadDocument entitles the process that runs a program; without nodes, on the machine of the control plane.
func workloadDocument(name string, id spiffeid.ID, program, nodes string) string {
	return head + fmt.Sprintf("kind: Workload\nmetadata: {name: %s}\nspec: {spiffeID: %q, selectors: [%q]%s}\n", name, id, "unix:path:"+program, nodes)
}

// workloadAPI is the address of the subject's socket.
func (s *subject) workloadAPI() string {
	return "unix://" + filepath.Join(filepath.Dir(s.folder), "workload.sock")
}

// change puts a document in the place of another, and says when.
func (s *subject) change(file, text string) (time.Time, error) {
	fresh := filepath.Join(s.folder, ".new")
	if err := os.WriteFile(fresh, []byte(text), 0o600); err != nil {
		return time.Time{}, err
	}
	return time.Now(), os.Rename(fresh, filepath.Join(s.folder, file))
}

// The two workloads: this process, and the one that holds streams. Both have a file of their own.
const (
	ownFile   = "own.yaml"
	otherFile = "other.yaml"
)

func (b *bench) measureIdentity(ctx context.Context, r *Report) error {
	own, err := os.Executable()
	if err != nil {
		return err
	}
	other, err := b.holderPath()
	if err != nil {
		return err
	}
	ownDocument := func(path string) string {
		return workloadDocument("own", spiffeid.RequireFromPath(trustDomain, path), own, "")
	}
	otherDocument := func(path string) string {
		return workloadDocument("other", spiffeid.RequireFromPath(trustDomain, path), other, "")
	}
	documents := b.documents(1)
	documents[ownFile], documents[otherFile] = ownDocument("/own"), otherDocument("/other")
	port, err := freePort()
	if err != nil {
		return err
	}
	agents := fmt.Sprintf("127.0.0.1:%d", port)
	s, err := b.sallyport(ctx, b.builds[0], documents, "--agent-listen", agents)
	if err != nil {
		return err
	}
	id := &Identity{Streams: openStreams}
	r.Identity = id
	if id.Rates, err = b.measureRates(ctx, s); err != nil {
		return err
	}

	// A stream of our own, alone and then beside those of another workload, which a change of ours does not concern.
	mine, err := watch(ctx, s.workloadAPI())
	if err != nil {
		return err
	}
	if id.Alone, err = mine.pushes(ctx, s, "alone", ownDocument); err != nil {
		return err
	}
	before := resident(s.plane)
	held, err := b.startHolder(other, s.workloadAPI(), openStreams)
	if err != nil {
		return err
	}
	id.Plane = megabytes(resident(s.plane) - before)
	if id.P50, id.P99, err = fetchTimes(ctx, s.workloadAPI()); err != nil {
		return err
	}
	if id.Beside, err = mine.pushes(ctx, s, "beside", ownDocument); err != nil {
		return err
	}
	if lines := held.said("told 2 "); len(lines) > 0 {
		return fmt.Errorf("a workload was told of a change that does not concern it: %s", lines)
	}
	for i := range pushes {
		began, err := s.change(otherFile, otherDocument(fmt.Sprintf("/other-%d", i)))
		if err != nil {
			return err
		}
		at, err := held.told(i + 2)
		if err != nil {
			return err
		}
		id.All = append(id.All, millis(at.Sub(began)))
	}
	held.stop()
	fmt.Printf("\nidentity, on %d cores, with %d open streams of another workload where not alone\n", signers, id.Streams)
	fmt.Printf("  fetch: p50 %.1f ms, p99 %.1f ms; %.0f MB more for the control plane\n", id.P50, id.P99, id.Plane)
	for _, p := range []struct {
		name  string
		times []float64
	}{{"alone", id.Alone}, {"to one, beside them", id.Beside}, {"to the last of them", id.All}} {
		fmt.Printf("  a changed document is pushed %-20s after %.0f ms (%.0f–%.0f)\n", p.name, median(p.times), p.times[0], p.times[len(p.times)-1])
	}
	return b.measureAgent(ctx, s, agents, id)
}

// measureAgent measures a machine beside the control plane's: the memory of its agent, and the way through it.
func (b *bench) measureAgent(ctx context.Context, s *subject, agents string, id *Identity) error {
	own, err := os.Executable()
	if err != nil {
		return err
	}
	other := filepath.Join(b.folder, "holder")
	nodes := ", nodes: [" + nodeName + "]"
	if _, err := s.change(otherFile, workloadDocument("other", spiffeid.RequireFromPath(trustDomain, "/there"), other, nodes)); err != nil {
		return err
	}
	if _, err := s.change(ownFile, workloadDocument("own", caller, own, nodes)); err != nil {
		return err
	}
	folder := filepath.Dir(s.folder)
	files := map[string]string{}
	for name, args := range map[string][]string{"bundle": {"ca", "export"}, "token": {"token", "create", "--node", nodeName}} {
		out, err := exec.CommandContext(ctx, b.builds[0].path, append(args, "--state", filepath.Join(folder, "state"))...).Output()
		if err != nil {
			return fmt.Errorf("sallyport %s: %w", strings.Join(args, " "), err)
		}
		files[name] = filepath.Join(folder, name)
		if err := os.WriteFile(files[name], out, 0o600); err != nil {
			return err
		}
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	connect := fmt.Sprintf("127.0.0.1:%d", port)
	socket := filepath.Join(folder, "agent.sock")
	agent, err := startProcess(b.builds[0].path, "agent", "--control-plane", agents, "--trust-bundle", files["bundle"],
		"--join-token-file", files["token"], "--state", filepath.Join(folder, "agent"), "--workload-socket", socket,
		"--connect", connect, "--gateway", strings.TrimPrefix(s.url, "https://"), "--gateway-name", "local",
		"--endpoint", "chat="+chatHost, "--log-format", "json")
	if err != nil {
		return err
	}
	b.started = append(b.started, agent)
	through := &subject{name: "through the agent", url: "http://" + connect, client: b.direct().client}
	there := chat(300, 0).on(1)
	there.host, there.path = connect, "/chat"+there.path
	if err := agent.await("forward", 20*time.Second, func() bool {
		status, err := there.once(ctx, through)
		return err == nil && status == 200
	}); err != nil {
		return err
	}
	if err := id.compare(ctx, b.rounds, func(ctx context.Context) error { return ok(chat(300, 0).once(ctx, s)) },
		func(ctx context.Context) error { return ok(there.once(ctx, through)) }); err != nil {
		return err
	}
	id.Before = megabytes(resident(agent.cmd.Process.Pid))
	held, err := b.startHolder(other, "unix://"+socket, openStreams)
	if err != nil {
		return err
	}
	id.Agent = megabytes(resident(agent.cmd.Process.Pid))
	held.stop()
	fmt.Printf("  an agent with %d SVIDs has %.0f MB, and %.0f MB before\n", openStreams, id.Agent, id.Before)
	fmt.Printf("  a request through it takes %.2f ms more than over mTLS at once, × %.2f (%.2f–%.2f) of that\n", id.ForwardedMS,
		median(id.Forwarded), id.Forwarded[0], id.Forwarded[len(id.Forwarded)-1])
	return nil
}

func ok(status int, err error) error {
	if err == nil && status != 200 {
		err = fmt.Errorf("status %d", status)
	}
	return err
}

// compare makes the same request both ways, in turn.
func (id *Identity) compare(ctx context.Context, rounds int, direct, through func(context.Context) error) error {
	const each = 100
	var added []float64
	for range rounds {
		var without, with []float64
		for range each {
			for _, way := range []struct {
				once  func(context.Context) error
				times *[]float64
			}{{direct, &without}, {through, &with}} {
				began := time.Now()
				if err := way.once(ctx); err != nil {
					return err
				}
				*way.times = append(*way.times, micros(time.Since(began))/1000)
			}
		}
		more := median(with) - median(without)
		added = append(added, more)
		id.Forwarded = append(id.Forwarded, more/median(without))
	}
	id.ForwardedMS = median(added)
	return nil
}

// fetchTimes are those of one who opens a stream, gets an SVID with a new key, and ends it.
func fetchTimes(ctx context.Context, socket string) (p50, p99 float64, err error) {
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(socket))
	if err != nil {
		return 0, 0, err
	}
	defer client.Close()
	var times []float64
	for range fetches {
		began := time.Now()
		if _, err := client.FetchX509SVID(ctx); err != nil {
			return 0, 0, err
		}
		times = append(times, micros(time.Since(began))/1000)
	}
	slices.Sort(times)
	return times[len(times)/2], times[len(times)*99/100], nil
}

// watcher passes on which SVID is pushed, and when.
type watcher chan arrival

type arrival struct {
	id spiffeid.ID
	at time.Time
}

// watch opens one stream, which ends with the context.
func watch(ctx context.Context, socket string) (watcher, error) {
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(socket))
	if err != nil {
		return nil, err
	}
	w := make(watcher, 16)
	go func() {
		_ = client.WatchX509Context(ctx, w)
		client.Close()
	}()
	return w, w.await(ctx, nil, "/own")
}

func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	w <- arrival{c.DefaultSVID().ID, time.Now()}
}

func (w watcher) OnX509ContextWatchError(error) {} // await ends

// await waits for an SVID.
func (w watcher) await(ctx context.Context, at *time.Time, path string) error {
	late := time.After(20 * time.Second)
	for {
		select {
		case a := <-w:
			if a.id.Path() != path {
				continue
			}
			if at != nil {
				*at = a.at
			}
			return nil
		case <-late:
			return fmt.Errorf("%s was not pushed", path)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// pushes changes our document again and again.
func (w watcher) pushes(ctx context.Context, s *subject, name string, document func(path string) string) (times []float64, err error) {
	for i := range pushes {
		path := fmt.Sprintf("/own-%s-%d", name, i)
		began, err := s.change(ownFile, document(path))
		if err != nil {
			return nil, err
		}
		var at time.Time
		if err := w.await(ctx, &at, path); err != nil {
			return nil, err
		}
		times = append(times, millis(at.Sub(began)))
	}
	return times, nil
}

func megabytes(bytes int64) float64 { return float64(bytes) / (1 << 20) }
