package node

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node/nodepb"
)

// assigned is what one agent's workloads are, and what they may reach. It is immutable once it is sealed.
type assigned struct {
	entries   map[string]issuer.Entry // by the names that the agent knows them by
	message   *nodepb.Entries
	endpoints *nodepb.Endpoints
	domains   map[spiffeid.TrustDomain]bool // whose bundles it gets
	all       bool                          // it gets every bundle
}

func newAssigned() *assigned {
	return &assigned{
		entries:   map[string]issuer.Entry{},
		message:   &nodepb.Entries{},
		endpoints: &nodepb.Endpoints{},
		domains:   map[spiffeid.TrustDomain]bool{},
	}
}

// nothing is what an agent has that nothing is assigned to.
func nothing() *assigned {
	a := newAssigned()
	a.seal()
	return a
}

func (a *assigned) add(e issuer.Entry) {
	m := &nodepb.Entry{
		SpiffeId: e.ID.String(), DnsNames: e.DNSNames, TtlNanoseconds: int64(e.TTL), FederatesAll: e.FederatesAll,
	}
	for _, s := range e.Selectors {
		m.Selectors = append(m.Selectors, &nodepb.Entry_Selector{Type: s.Type, Value: s.Value})
	}
	for _, td := range e.FederatesWith {
		m.FederatesWith = append(m.FederatesWith, td.Name())
		a.domains[td] = true
	}
	a.all = a.all || e.FederatesAll
	m.Id = hex.EncodeToString(digest(m)[:16])
	if _, ok := a.entries[m.Id]; !ok {
		a.entries[m.Id] = e
		a.message.Entries = append(a.message.Entries, m)
	}
}

func (a *assigned) tell(endpoints []Endpoint) {
	for _, e := range endpoints {
		m := &nodepb.Endpoint{Name: string(e.Name), Hostname: e.Hostname}
		for _, g := range e.Gateways {
			m.Gateways = append(m.Gateways, &nodepb.Endpoint_Gateway{SpiffeId: g.ID.String(), Address: g.Address})
		}
		a.endpoints.Endpoints = append(a.endpoints.Endpoints, m)
	}
}

func (a *assigned) seal() {
	a.message.Digest, a.endpoints.Digest = digest(a.message), digest(a.endpoints)
}

// digest is of everything that a message says. Within one program, equal messages have equal ones.
func digest(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil { // text that is not UTF-8, which the model does not let pass
		b = []byte(err.Error())
	}
	sum := sha256.Sum256(b)
	return sum[:]
}

// bundles are those that are in force, as they are sent.
type bundles struct {
	own       bundle
	federated map[spiffeid.TrustDomain]bundle
}

type bundle struct{ document, digest []byte }

func marshalBundles(b issuer.Bundles) (bundles, error) {
	all := bundles{federated: map[spiffeid.TrustDomain]bundle{}}
	if b.Own == nil {
		return all, nil
	}
	var err error
	if all.own, err = marshalBundle(b.Own); err != nil {
		return all, err
	}
	for td, other := range b.Federated {
		if all.federated[td], err = marshalBundle(other); err != nil {
			return all, err
		}
	}
	return all, nil
}

// marshalBundle also returns a digest that is the same in whatever order the library writes the keys.
func marshalBundle(b *spiffebundle.Bundle) (bundle, error) {
	document, err := b.Marshal()
	if err != nil {
		return bundle{}, fmt.Errorf("marshal bundle of %s: %w", b.TrustDomain(), err)
	}
	var parts map[string]json.RawMessage
	var keys []json.RawMessage
	if err := json.Unmarshal(document, &parts); err != nil {
		return bundle{}, fmt.Errorf("marshal bundle of %s: %w", b.TrustDomain(), err)
	}
	if err := json.Unmarshal(parts["keys"], &keys); err != nil {
		return bundle{}, fmt.Errorf("marshal bundle of %s: %w", b.TrustDomain(), err)
	}
	slices.SortFunc(keys, func(a, b json.RawMessage) int { return bytes.Compare(a, b) })
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(parts)) {
		if name != "keys" {
			fmt.Fprintf(h, "%q %q\n", name, parts[name])
		}
	}
	for _, key := range keys {
		fmt.Fprintf(h, "%q\n", key)
	}
	return bundle{document, h.Sum(nil)}, nil
}

// of returns the bundles that an agent gets: what its workloads get, and no others.
func (b bundles) of(a *assigned) *nodepb.Bundles {
	m := &nodepb.Bundles{Own: b.own.document, Federated: map[string][]byte{}}
	h := sha256.New()
	fmt.Fprintf(h, "own %x\n", b.own.digest)
	byName := func(x, y spiffeid.TrustDomain) int { return cmp.Compare(x.Name(), y.Name()) }
	for _, td := range slices.SortedFunc(maps.Keys(b.federated), byName) {
		if a.all || a.domains[td] {
			m.Federated[td.Name()] = b.federated[td].document
			fmt.Fprintf(h, "%s %x\n", td.Name(), b.federated[td].digest)
		}
	}
	m.Digest = h.Sum(nil)
	return m
}
