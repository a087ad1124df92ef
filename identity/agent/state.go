package agent

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/encoding/protojson"

	"sallyport.dev/identity/internal/whole"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/node/nodepb"
	"sallyport.dev/segment"
)

// The names of files in the folder.
const (
	svidFile  = "agent.pem"  // the agent's private key (PKCS #8) and its SVID: one file, so that they fit
	knownFile = "known.json" // what was sent last: entries, bundles, endpoints
)

// known is what the control plane sent last.
type known struct {
	message nodepb.WatchResponse
	own     *spiffebundle.Bundle // nil: nothing yet
}

// request says what is known, for the control plane to send only what is different.
func (k *known) request(endpoints bool) *nodepb.WatchRequest {
	return &nodepb.WatchRequest{
		EntriesDigest: k.message.GetEntries().GetDigest(), BundlesDigest: k.message.GetBundles().GetDigest(),
		EndpointsDigest: k.message.GetEndpoints().GetDigest(), WantsEndpoints: endpoints,
	}
}

// open reads the folder and feeds the issuer with what it has.
func (a *Agent) open(i Issuer) error {
	if err := os.MkdirAll(a.config.Dir, 0o700); err != nil {
		return fmt.Errorf("open agent's state: %w", err)
	}
	a.own.Store(a.config.TrustBundle)
	if err := a.loadKnown(i); err != nil {
		return fmt.Errorf("open agent's state: %s: %w; without the file the agent begins with the trust bundle that it is given",
			a.path(knownFile), err)
	}
	if own := a.own.Load(); own == nil || len(own.X509Authorities()) == 0 || own.TrustDomain() != a.config.TrustDomain {
		return fmt.Errorf("open agent's state: there is no bundle of %s to know the control plane by", a.config.TrustDomain)
	}
	if err := a.loadSVID(); err != nil {
		return fmt.Errorf("open agent's state: %s: %w; without the file the machine is attested again", a.path(svidFile), err)
	}
	return nil
}

func (a *Agent) path(name string) string { return filepath.Join(a.config.Dir, name) }

func (a *Agent) loadKnown(i Issuer) error {
	data, err := os.ReadFile(a.path(knownFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var message nodepb.WatchResponse
	// What a later version knows besides is sent again.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, &message); err != nil {
		return err
	}
	return a.apply(&message, i)
}

func (a *Agent) loadSVID() error {
	f, err := os.Open(a.path(svidFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if mode := info.Mode(); !mode.IsRegular() || mode.Perm()&0o077 != 0 {
		return fmt.Errorf("others may have read the agent's private key (mode %04o)", mode.Perm())
	}
	data := make([]byte, info.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		return err
	}
	svid, err := x509svid.Parse(data, data)
	if err != nil {
		return err
	}
	if !svid.ID.MemberOf(a.config.TrustDomain) || !nodepb.IsAgent(svid.ID) {
		return fmt.Errorf("%s is not an agent of %s", svid.ID, a.config.TrustDomain)
	}
	a.svid = svid
	a.note(func(s *Status) { s.ID, s.Expires = svid.ID, end(svid) })
	return nil
}

func (a *Agent) saveSVID(svid *x509svid.SVID) error {
	der, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		return fmt.Errorf("keep agent's SVID: %w", err)
	}
	data := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	for _, c := range svid.Certificates {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	if err := writeFile(a.path(svidFile), data); err != nil {
		return fmt.Errorf("keep agent's SVID: %w", err)
	}
	return nil
}

// learn puts in force what was sent, and keeps it. What cannot be kept is in force all the same: it is sent again
// after a restart.
func (a *Agent) learn(resp *nodepb.WatchResponse, i Issuer) error {
	if err := a.apply(resp, i); err != nil {
		return err
	}
	if err := a.saveKnown(); err != nil {
		a.failed("what the control plane sent is not kept", err)
	}
	return nil
}

func (a *Agent) saveKnown() error {
	data, err := protojson.Marshal(&a.known.message)
	if err != nil {
		return err
	}
	return writeFile(a.path(knownFile), data)
}

// apply puts a message in force, all or nothing.
func (a *Agent) apply(m *nodepb.WatchResponse, i Issuer) error {
	var bundles issuer.Bundles
	var entries []issuer.Entry
	var names map[string]string
	var endpoints []Endpoint
	var err error
	if m.Bundles != nil {
		if bundles, err = a.readBundles(m.Bundles); err != nil {
			return err
		}
	}
	if m.Entries != nil {
		if entries, names, err = a.readEntries(m.Entries); err != nil {
			return err
		}
	}
	if m.Endpoints != nil {
		if endpoints, err = a.readEndpoints(m.Endpoints); err != nil {
			return err
		}
	}
	if m.Bundles != nil {
		a.known.message.Bundles, a.known.own = m.Bundles, bundles.Own
		a.own.Store(bundles.Own)
		i.SetBundles(bundles)
	}
	if m.Entries != nil {
		a.known.message.Entries = m.Entries
		a.names.Store(&names) // before an entry can be asked for
		i.Set(entries)
	}
	if m.Endpoints != nil && a.config.Endpoints != nil {
		a.known.message.Endpoints = m.Endpoints
		a.config.Endpoints(endpoints)
	}
	return nil
}

func (a *Agent) readBundles(m *nodepb.Bundles) (issuer.Bundles, error) {
	own, err := spiffebundle.Parse(a.config.TrustDomain, m.Own)
	if err != nil {
		return issuer.Bundles{}, err
	}
	if len(own.X509Authorities()) == 0 {
		return issuer.Bundles{}, errors.New("the bundle has no authority: nobody could be verified any more")
	}
	b := issuer.Bundles{Own: own, Federated: map[spiffeid.TrustDomain]*spiffebundle.Bundle{}}
	for name, document := range m.Federated {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return issuer.Bundles{}, err
		}
		if td == a.config.TrustDomain {
			return issuer.Bundles{}, errors.New("the own trust domain is among those federated with")
		}
		if b.Federated[td], err = spiffebundle.Parse(td, document); err != nil {
			return issuer.Bundles{}, err
		}
	}
	return b, nil
}

// readEntries also returns the names of the entries by what they say.
func (a *Agent) readEntries(m *nodepb.Entries) ([]issuer.Entry, map[string]string, error) {
	entries, names := make([]issuer.Entry, len(m.Entries)), make(map[string]string, len(m.Entries))
	for n, one := range m.Entries {
		id, err := spiffeid.FromString(one.SpiffeId)
		if err != nil {
			return nil, nil, err
		}
		if !id.MemberOf(a.config.TrustDomain) || id.Path() == "" || nodepb.Reserved(id) {
			return nil, nil, fmt.Errorf("%s is not a workload of %s", id, a.config.TrustDomain)
		}
		e := issuer.Entry{
			ID: id, DNSNames: one.DnsNames, TTL: time.Duration(one.TtlNanoseconds), FederatesAll: one.FederatesAll,
		}
		for _, s := range one.Selectors {
			e.Selectors = append(e.Selectors, segment.Selector{Type: s.Type, Value: s.Value})
		}
		for _, name := range one.FederatesWith {
			td, err := spiffeid.TrustDomainFromString(name)
			if err != nil {
				return nil, nil, err
			}
			e.FederatesWith = append(e.FederatesWith, td)
		}
		entries[n] = e
		names[says(e)] = one.Id
	}
	return entries, names, nil
}

func (a *Agent) readEndpoints(m *nodepb.Endpoints) ([]Endpoint, error) {
	endpoints := make([]Endpoint, len(m.Endpoints))
	for n, one := range m.Endpoints {
		e := Endpoint{Name: segment.EndpointName(one.Name), Hostname: one.Hostname}
		if e.Name == "" || e.Hostname == "" || strings.Trim(e.Hostname, hostLetters) != "" {
			return nil, fmt.Errorf("endpoint %q has the host name %q", e.Name, e.Hostname)
		}
		for _, g := range one.Gateways {
			id, err := spiffeid.FromString(g.SpiffeId)
			if err != nil {
				return nil, err
			}
			if !id.MemberOf(a.config.TrustDomain) || nodepb.Reserved(id) {
				return nil, fmt.Errorf("%s is not a gateway of %s", id, a.config.TrustDomain)
			}
			if host, port, err := net.SplitHostPort(g.Address); err != nil || host == "" || port == "" {
				return nil, fmt.Errorf("gateway %s has the address %q", id, g.Address)
			}
			e.Gateways = append(e.Gateways, Gateway{id, g.Address})
		}
		endpoints[n] = e
	}
	return endpoints, nil
}

// hostLetters are those of DNS names.
const hostLetters = "abcdefghijklmnopqrstuvwxyz0123456789-."

// forget drops what an agent may no longer hand out, and where its workloads went; the bundle stays.
func (a *Agent) forget(i Issuer) error {
	i.Set(nil)
	a.names.Store(nil)
	if a.config.Endpoints != nil {
		a.config.Endpoints(nil)
	}
	a.known.message.Entries, a.known.message.Endpoints = nil, nil
	if err := a.saveKnown(); err != nil {
		return fmt.Errorf("forget what the control plane sent: %w", err)
	}
	return nil
}

// writeFile puts a whole file, on the disk, in the place of the one before.
func writeFile(path string, data []byte) error { return whole.Write(path, data, ".new-*", os.Rename) }
