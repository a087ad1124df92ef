package node

import (
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity/node/nodepb"
)

const (
	maxAgents  = 10_000
	maxWatches = 4 // at a time, of one agent: a connection that was lost may not have ended yet
)

// agents are those that were attested or revoked. They stand in a file; when they were last seen is written only along
// with something else.
type agents struct {
	path string

	mu      sync.Mutex
	byID    map[spiffeid.ID]agent
	seen    map[spiffeid.ID]time.Time
	watches map[spiffeid.ID]watches
}

// watches are the streams of one agent.
type watches struct {
	n       int
	changed chan struct{} // closed when one of them may no longer go on
}

// agent is what is kept of one. Of its X.509-SVIDs one is good at a time, so that whoever copied an older one, or a
// machine that a new one took the place of, is noticed. It is known by its digest: who has a CA's key can give a forged one
// every serial number, but not the key that the agent has.
type agent struct {
	ID       spiffeid.ID `json:"id"`
	Attested string      `json:"attested,omitempty"`
	SVID     string      `json:"serial,omitempty"` // the SHA-256 of the one that is good; earlier versions kept the serial number
	Root     string      `json:"root,omitempty"`   // the SHA-256 of the root above it
	Next     string      `json:"next,omitempty"`   // the same of the one after: SVID's place is its once it has been used
	NextRoot string      `json:"nextRoot,omitempty"`
	Expires  time.Time   `json:"expires,omitzero"`
	LastSeen time.Time   `json:"lastSeen,omitzero"`
	Revoked  time.Time   `json:"revoked,omitzero"`
}

func openAgents(path string) (*agents, error) {
	a := &agents{
		path: path, byID: map[spiffeid.ID]agent{}, seen: map[spiffeid.ID]time.Time{}, watches: map[spiffeid.ID]watches{},
	}
	var list []agent
	if err := readFile(path, &list); err != nil {
		return nil, fmt.Errorf("open agents: %w", err)
	}
	for _, one := range list {
		a.byID[one.ID] = one
		a.seen[one.ID] = one.LastSeen
	}
	return a, nil
}

// keep writes the agents with one of them changed, and then puts them in force.
func (a *agents) keep(changed agent) error {
	next := maps.Clone(a.byID)
	next[changed.ID] = changed
	if err := a.write(next); err != nil {
		return status.Errorf(codes.Unavailable, "keep agents: %v", err)
	}
	a.byID = next
	return nil
}

func (a *agents) write(all map[spiffeid.ID]agent) error {
	list := slices.SortedFunc(maps.Values(all), func(x, y agent) int { return cmp.Compare(x.ID.String(), y.ID.String()) })
	for i := range list {
		list[i].LastSeen = a.seen[list[i].ID].UTC().Round(0)
	}
	return writeFile(a.path, list)
}

// admissible reports whether an ID may be attested.
func (a *agents) admissible(id spiffeid.ID) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.byID[id].Revoked.IsZero() {
		return nodepb.Refuse(nodepb.AgentRevoked, "the agent is revoked")
	}
	return nil
}

// admit notes that an agent was attested and has an SVID: no other is good from then on.
func (a *agents) admit(id spiffeid.ID, how string, svid signed, now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	before, known := a.byID[id]
	if !before.Revoked.IsZero() {
		return nodepb.Refuse(nodepb.AgentRevoked, "the agent is revoked")
	}
	if !known && len(a.byID) >= maxAgents {
		// Who was revoked stays; who let his SVID end must be attested again anyway.
		maps.DeleteFunc(a.byID, func(_ spiffeid.ID, other agent) bool {
			return other.Revoked.IsZero() && now.After(other.Expires)
		})
		maps.DeleteFunc(a.seen, func(gone spiffeid.ID, _ time.Time) bool { return a.byID[gone].ID.IsZero() })
		if len(a.byID) >= maxAgents {
			return status.Errorf(codes.ResourceExhausted, "there are %d agents already", len(a.byID))
		}
	}
	a.seen[id] = now
	defer a.wake(id)
	return a.keep(agent{ID: id, Attested: how, SVID: digestOf(svid.chain[0]), Root: svid.root, Expires: svid.chain[0].NotAfter})
}

// digestOf names a certificate.
func digestOf(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// renew notes that an agent has a further SVID.
func (a *agents) renew(id spiffeid.ID, svid signed) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	one, known := a.byID[id]
	if !known || !one.Revoked.IsZero() {
		return nodepb.Refuse(nodepb.AgentRevoked, "the agent is revoked")
	}
	one.Next, one.NextRoot, one.Expires = digestOf(svid.chain[0]), svid.root, svid.chain[0].NotAfter
	return a.keep(one)
}

// authorize decides whether an agent's SVID, which is valid, is good.
func (a *agents) authorize(id spiffeid.ID, svid *x509.Certificate, now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	one, known := a.byID[id]
	is := func(kept string) bool { return kept == digestOf(svid) || kept == svid.SerialNumber.Text(16) }
	switch {
	case !known:
		return nodepb.Refuse(nodepb.MustReattest, "the agent is not known")
	case !one.Revoked.IsZero():
		return nodepb.Refuse(nodepb.AgentRevoked, "the agent is revoked")
	case is(one.SVID):
	case is(one.Next):
		one.SVID, one.Root, one.Next, one.NextRoot = one.Next, one.NextRoot, "", ""
		if err := a.keep(one); err != nil {
			return err
		}
		a.wake(id)
	default:
		return nodepb.Refuse(nodepb.MustReattest, "another SVID of this agent has been used since: it was renewed or attested elsewhere")
	}
	a.seen[id] = now
	return nil
}

func (a *agents) revoke(id spiffeid.ID, now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	one := a.byID[id]
	one.ID = id
	if one.Revoked.IsZero() {
		one.Revoked = now.UTC().Round(0)
	}
	a.byID = maps.Clone(a.byID) // in force also if it cannot be written
	a.byID[id] = one
	a.wake(id)
	return a.write(a.byID)
}

// watch counts a stream; the caller must call end when it ends.
func (a *agents) watch(id spiffeid.ID) (end func(), err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.watches[id]
	if w.n >= maxWatches {
		return nil, status.Error(codes.ResourceExhausted, "the agent has too many streams")
	}
	if w.n++; w.n == 1 {
		w.changed = make(chan struct{})
	}
	a.watches[id] = w
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		w := a.watches[id]
		if w.n--; w.n > 0 {
			a.watches[id] = w
		} else {
			delete(a.watches, id)
		}
		a.seen[id] = time.Now()
	}, nil
}

// changed is closed when the SVID of a stream of this agent may no longer be good.
func (a *agents) changed(id spiffeid.ID) <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.watches[id].changed
}

// wake lets the streams of an agent look again.
func (a *agents) wake(id spiffeid.ID) {
	if w, ok := a.watches[id]; ok {
		close(w.changed)
		w.changed = make(chan struct{})
		a.watches[id] = w
	}
}

func (a *agents) list(now time.Time) []AgentInfo {
	a.mu.Lock()
	defer a.mu.Unlock()
	var list []AgentInfo
	for id, one := range a.byID {
		seen := a.seen[id]
		if a.watches[id].n > 0 && one.Revoked.IsZero() {
			seen = now
		}
		list = append(list, AgentInfo{id, one.Attested, seen, one.Expires, one.Root, !one.Revoked.IsZero()})
	}
	slices.SortFunc(list, func(x, y AgentInfo) int { return cmp.Compare(x.ID.String(), y.ID.String()) })
	return list
}

// errNoAgent is for callers that present nothing that could be an agent's.
var errNoAgent = errors.New("present the X.509-SVID of an agent")
