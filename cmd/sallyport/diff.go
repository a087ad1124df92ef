package main

import (
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport.dev/authz"
	"sallyport.dev/controlplane/operator"
	"sallyport.dev/segment"
)

func diffCommand() *cobra.Command {
	var d deployment
	var o output
	var c comparing
	var r replaying
	var running, allowGains bool
	cmd := &cobra.Command{
		Use:   "diff OLD NEW | diff --running NEW",
		Short: "Say who gains and who loses access between two sets of documents",
		Long: `Diff compares two folders or files of documents, or with --running what is in force with one, and says in terms of
callers and resources who gains and who loses access, exactly. It also looks ahead: at what begins and ends later by
notBefore, expires and windows. With --replay it asks both how they judge the flows that were recorded. It changes
nothing. Exit status 1 if anybody gains access, unless --allow-gains.`,
		Example: `  sallyport diff base/documents documents
  sallyport diff --running documents --replay 24h
  sallyport diff base/documents documents -o markdown`,
		Args: func(cmd *cobra.Command, args []string) error {
			if want := map[bool]int{true: 1, false: 2}[running]; len(args) != want {
				return usage("`sallyport diff OLD NEW`, or `sallyport diff --running NEW`", "diff takes %s of documents here, not %d", count(want, "folder"), len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.check(); err != nil {
				return err
			}
			if err := r.check(); err != nil {
				return err
			}
			var old *side
			var err error
			if running {
				if old, err = c.running(cmd, &d); err != nil {
					return err
				}
			} else if old, err = c.read(&d, args[0]); err != nil {
				return err
			}
			new, err := c.read(&d, args[len(args)-1])
			if err != nil {
				return err
			}
			report, err := c.compare(old, new)
			if err != nil {
				return err
			}
			if r.wanted() {
				if report.Replay, err = r.run(cmd, c.state, old.first, new.first); err != nil {
					return err
				}
			}
			if err := report.print(cmd.OutOrStdout(), &o, allowGains); err != nil {
				return err
			}
			if report.Gains > 0 && !allowGains {
				return errProblems
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&running, "running", false, "compare with what the running control plane has in force, in place of OLD")
	cmd.Flags().BoolVar(&allowGains, "allow-gains", false, "end with exit status 0 also if somebody gains access")
	c.add(cmd)
	r.add(cmd)
	d.add(cmd.Flags())
	o.add(cmd, "text", "json", "markdown", "sarif")
	return cmd
}

// comparing is how two sides are compared.
type comparing struct {
	state        string
	at           string
	now          time.Time
	nowOnly      bool
	shadowGrants bool
}

func (c *comparing) add(cmd *cobra.Command) {
	stateFlag(cmd.Flags(), &c.state)
	cmd.Flags().StringVar(&c.at, "at", "", "compare what holds at a `TIME` (RFC 3339) and later, instead of now and later")
	cmd.Flags().BoolVar(&c.nowOnly, "now-only", false, "leave out what begins or ends later")
	cmd.Flags().BoolVar(&c.shadowGrants, "shadow-grants", false, "compare what would hold if what is tried in shadow were enforced")
}

func (c *comparing) check() (err error) {
	c.now, err = momentOf(c.at)
	return err
}

// momentOf reads the flag --at; empty is now.
func momentOf(at string) (time.Time, error) {
	if at == "" {
		return time.Now().UTC().Truncate(time.Second), nil
	}
	t, err := time.Parse(time.RFC3339, at)
	if err != nil {
		return t, usage("write it as 2026-01-02T15:04:05Z", "--at: %q is no time", at)
	}
	return t, nil
}

// side is one of the two that are compared.
type side struct {
	name string
	// at returns the policy of a moment, which is later than the one before.
	at func(time.Time) (*authz.Policy, error)
	facts
	first *authz.Policy // at the first moment
}

// facts are what is said of a side beside its policies. A running control plane sends it with each policy.
type facts struct {
	Grants map[authz.Rule]segment.Pos `json:"grants"`
	Tried  map[authz.Rule]segment.Pos `json:"tried,omitempty"` // those of the shadow folder
	// Moments are when grants begin or end once and for all.
	Moments []time.Time `json:"moments,omitempty"`
	// Holders are, for each identity, who may hold it.
	Holders map[string]string `json:"holders,omitempty"`
}

func factsOf(cfg *segment.Config) facts {
	f := facts{Grants: map[authz.Rule]segment.Pos{}, Tried: map[authz.Rule]segment.Pos{}, Holders: map[string]string{}}
	for _, part := range []struct {
		grants []segment.Grant
		places map[authz.Rule]segment.Pos
	}{{cfg.Grants, f.Grants}, {cfg.Shadow, f.Tried}} {
		for i := range part.grants {
			g := &part.grants[i]
			part.places[authz.RuleOf(g.Name)] = g.Pos
			for _, t := range []time.Time{g.NotBefore, g.Expires} {
				if !t.IsZero() {
					f.Moments = append(f.Moments, t)
				}
			}
		}
	}
	for i := range cfg.Workloads {
		w := &cfg.Workloads[i]
		var parts []string
		for _, s := range w.Selectors {
			parts = append(parts, s.String())
		}
		holder := strings.Join(parts, ", ")
		for _, n := range w.Nodes {
			holder += " on " + string(n)
		}
		if before := f.Holders[w.ID.String()]; before != "" {
			holder = before + "; or " + holder
		}
		f.Holders[w.ID.String()] = holder
	}
	return f
}

func (c *comparing) read(d *deployment, path string) (*side, error) {
	cfg, err := d.assemble(path)
	if err != nil {
		return nil, err
	}
	var last *authz.Policy
	return &side{name: path, facts: factsOf(&cfg), at: func(now time.Time) (*authz.Policy, error) {
		last = authz.Recompile(last, &cfg, now)
		return last, nil
	}}, nil
}

// policyInForce is what a running control plane says of its policy.
type policyInForce struct {
	Policy     *authz.Policy `json:"policy"`
	Generation string        `json:"generation"`
	facts
}

// policyAction answers with the policy of the documents in force, at a moment.
func (p *plane) policyAction(q url.Values) (any, error) {
	at, err := time.Parse(time.RFC3339Nano, q.Get("at"))
	if err != nil {
		return nil, fmt.Errorf("at: %w", err)
	}
	g := p.pipeline.State().Generation
	if g == nil {
		return nil, &operator.RefusedError{Failure: operator.Failure{Error: "no generation has been published yet, so everything is denied", Hint: "see `sallyport status`"}}
	}
	return policyInForce{authz.Compile(&g.Config, at), g.Digest.Short(), factsOf(&g.Config)}, nil
}

func askPolicy(cmd *cobra.Command, state string, at time.Time) (in policyInForce, err error) {
	in, err = ask(cmd, state, func(client *operator.Client) (in policyInForce, err error) {
		return in, client.Get(cmd.Context(), "/policy", url.Values{"at": {at.Format(time.RFC3339Nano)}}, &in)
	})
	if err == nil && in.Policy == nil {
		err = failed("the control plane and this command must be of one version", "the control plane answers without a policy")
	}
	return in, err
}

// running is what the control plane has in force. The other side is then of its trust domain.
func (c *comparing) running(cmd *cobra.Command, d *deployment) (*side, error) {
	st, err := ask(cmd, c.state, func(client *operator.Client) (st operator.Status, err error) {
		return st, client.Get(cmd.Context(), "/status", nil, &st)
	})
	if err != nil {
		return nil, err
	}
	d.trustDomain = st.TrustDomain.Name()
	in, err := askPolicy(cmd, c.state, c.now)
	if err != nil {
		return nil, err
	}
	return &side{name: "generation " + in.Generation, facts: in.facts, at: func(now time.Time) (*authz.Policy, error) {
		next, err := askPolicy(cmd, c.state, now)
		if err == nil && next.Generation != in.Generation {
			err = failed("run it again", "the documents in force have changed in the meantime")
		}
		return next.Policy, err
	}}, nil
}

// comparison is the answer of diff.
type comparison struct {
	Old    string    `json:"old"`
	New    string    `json:"new"`
	At     time.Time `json:"at"`
	Gains  int       `json:"gains"` // of Changes and of Later
	Losses int       `json:"losses"`

	Changes []authz.Change `json:"changes"`
	Later   []later        `json:"later,omitempty"` // what was no change before
	// Grants are where the grants stand that are a cause.
	OldGrants map[authz.Rule]segment.Pos `json:"old_grants"`
	NewGrants map[authz.Rule]segment.Pos `json:"new_grants"`
	Notes     []string                   `json:"notes,omitempty"`
	Replay    *replayed                  `json:"replay,omitempty"`
}

// later are changes that come by time alone.
type later struct {
	At      time.Time      `json:"at"`
	Changes []authz.Change `json:"changes"`
}

const (
	maxMoments = 1000
	// After a moment at which a grant begins or ends, all that changes are windows, and they repeat every week. A day
	// more is for clocks that are set forward or back in it.
	period = 8 * 24 * time.Hour
)

// compare compares two sides at the first moment, and at each later one at which time changes either.
func (c *comparing) compare(old, new *side) (*comparison, error) {
	out := &comparison{Old: old.name, New: new.name, At: c.now, Changes: []authz.Change{}, OldGrants: map[authz.Rule]segment.Pos{}, NewGrants: map[authz.Rule]segment.Pos{}}
	once := slices.SortedFunc(slices.Values(slices.Concat(old.Moments, new.Moments)), time.Time.Compare)
	seen := map[string]bool{}
	began := c.now // when a grant last began or ended
	for now, n := c.now, 0; ; n++ {
		if n == maxMoments {
			return nil, failed("compare single moments with --at and --now-only", "there are more than %d moments at which grants begin or end", maxMoments)
		}
		was, err := old.at(now)
		if err != nil {
			return nil, err
		}
		is, err := new.at(now)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			old.first, new.first = was, is
		}
		changes := c.diff(was, is)
		fresh := slices.DeleteFunc(changes, func(ch authz.Change) bool {
			key := fmt.Sprintf("%t %t %q %q %q %q", ch.Gain, ch.Budget, ch.Callers, ch.Endpoint, ch.Operations, ch.Resources)
			for _, why := range ch.Causes {
				key += fmt.Sprintf(" %s %s", why.WasBudget, why.IsBudget)
			}
			told := seen[key]
			seen[key] = true
			return told
		})
		out.add(c.places, old, new, fresh)
		if n == 0 {
			out.Changes = append(out.Changes, fresh...)
		} else if len(fresh) > 0 {
			out.Later = append(out.Later, later{now, fresh})
		}
		if c.nowOnly {
			break
		}
		for len(once) > 0 && !once[0].After(now) {
			if once[0].After(began) {
				began = once[0]
			}
			once = once[1:]
		}
		next := was.NextChange
		if next.IsZero() || !is.NextChange.IsZero() && is.NextChange.Before(next) {
			next = is.NextChange
		}
		if !next.IsZero() && next.Sub(began) > period && (len(once) == 0 || once[0].After(next)) { // nothing new in another week
			next = time.Time{}
			if len(once) > 0 {
				next = once[0]
			}
		}
		if !next.After(now) {
			break
		}
		now = next
	}
	out.Notes = notes(old.Holders, new.Holders)
	return out, nil
}

func (c *comparing) diff(old, new *authz.Policy) []authz.Change {
	if c.shadowGrants {
		return authz.DiffShadow(old, new)
	}
	return authz.Diff(old, new)
}

// places are where the grants stand that decide in what is compared.
func (c *comparing) places(of *side) map[authz.Rule]segment.Pos {
	if c.shadowGrants && len(of.Tried) > 0 {
		return of.Tried
	}
	return of.Grants
}

// add counts changes, and notes where their causes stand.
func (out *comparison) add(places func(*side) map[authz.Rule]segment.Pos, old, new *side, changes []authz.Change) {
	for _, ch := range changes {
		if ch.Gain {
			out.Gains++
		} else {
			out.Losses++
		}
		for _, why := range ch.Causes {
			if pos, ok := places(old)[why.Was]; ok {
				out.OldGrants[why.Was] = pos
			}
			if pos, ok := places(new)[why.Is]; ok {
				out.NewGrants[why.Is] = pos
			}
		}
	}
}

// notes say where the same caller may be somebody else: that is no matter of grants.
func notes(old, new map[string]string) []string {
	var all []string
	for _, id := range slices.Sorted(maps.Keys(new)) {
		if was, is := old[id], new[id]; was != "" && was != is {
			all = append(all, fmt.Sprintf("%s may be held by others: by %s, and was by %s", id, is, was))
		}
	}
	return all
}
