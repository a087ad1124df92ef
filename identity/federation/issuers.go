package federation

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"sallyport.dev/segment"
)

// IssuersConfig is what the following of issuers needs. All of it is needed.
type IssuersConfig struct {
	// Dir keeps the last good keys. It is made with mode 0700 where there is none, and is that of these issuers alone.
	Dir string
	// Publish is told the keys of all issuers whose keys are known, as segment.KeySet writes them, whenever those of one
	// have changed. It must not block.
	Publish func(map[segment.IssuerName]string)
	Log     *slog.Logger
}

// Issuers keeps the keys fresh that the tokens of OpenID providers are verified with (OpenID Connect Discovery 1.0, 4;
// OpenID Connect Core 1.0, 10.1.1). A key that an issuer no longer publishes goes at the next fetch. An answer without a
// single usable key is a fault, and the last good keys stay: unlike a SPIFFE bundle, an empty set says nowhere that all
// keys are revoked, and an issuer whose keys are lost replaces them. Whoever does not trust an issuer any more takes its
// document away, and the keys go at once. Set and Status are safe for concurrent use.
type Issuers struct {
	config    IssuersConfig
	fetcher   fetcher
	engine    engine[segment.TokenIssuer, *issuer]
	published map[segment.IssuerName]string
	status    atomic.Pointer[[]IssuerStatus]
}

// IssuerStatus is what is known of one issuer.
type IssuerStatus struct {
	Name        segment.IssuerName `json:"name"`
	Issuer      string             `json:"issuer"`
	LastSuccess time.Time          `json:"last_success,omitzero"` // also before a restart; zero: never
	Next        time.Time          `json:"next"`                  // when its keys are fetched next
	Error       string             `json:"error,omitempty"`       // why the last fetch failed; "": it did not
	Keys        int                `json:"keys"`                  // 0: none of its tokens can be verified
}

// NewIssuers returns what follows no issuer yet. It opens its folder, which nobody else may get into.
func NewIssuers(c IssuersConfig) (*Issuers, error) {
	i := &Issuers{config: c}
	i.engine = engine[segment.TokenIssuer, *issuer]{
		log: c.Log, name: "issuer", id: whichIssuer, who: func(doc segment.TokenIssuer) string { return string(doc.Name) },
		restore: i.restore, publish: i.publish,
	}
	i.status.Store(&[]IssuerStatus{})
	if err := i.engine.open(c.Dir); err != nil {
		return nil, err
	}
	return i, nil
}

// whichIssuer tells issuers apart by more than their name: whoever comes under the name of another begins with nothing.
func whichIssuer(doc segment.TokenIssuer) string {
	return fmt.Sprintf("%q %q %q", doc.Name, doc.Issuer, doc.JWKSURI)
}

// Set says which issuers are followed from now on. The keys of all others are dropped at once, here and on the disk.
func (i *Issuers) Set(all []segment.TokenIssuer) { i.engine.set(slices.Clone(all)) }

// Status returns what is known, by name.
func (i *Issuers) Status() []IssuerStatus { return slices.Clone(*i.status.Load()) }

// Run follows until the context ends. It must run once only.
func (i *Issuers) Run(ctx context.Context) error {
	i.engine.run(ctx)
	return nil
}

// issuer is an issuer that is followed.
type issuer struct {
	*Issuers
	begun
	keys jwks // the latest
}

// jwks is keys as segment.KeySet writes them. The zero value is none.
type jwks struct {
	text  string
	count int
}

func parseKeys(document []byte) (jwks, error) {
	keys, err := segment.ParseKeys(document)
	if err != nil {
		return jwks{}, err
	}
	text := segment.KeySet(keys)
	if text == "" {
		return jwks{}, fmt.Errorf("parse keys: none of %d can be written", len(keys))
	}
	return jwks{text, len(keys)}, nil
}

// issuerRecord is what is on the disk of an issuer.
type issuerRecord struct {
	Name    segment.IssuerName `json:"name"`
	Issuer  string             `json:"issuer"`
	JWKSURI string             `json:"jwksUri,omitempty"`
	Initial string             `json:"initial,omitempty"` // digest of the initial keys
	Fetched time.Time          `json:"fetched"`
	Keys    json.RawMessage    `json:"keys"` // JWK set
}

// restore returns an issuer with what is on the disk of it.
func (i *Issuers) restore(doc segment.TokenIssuer) *issuer {
	n := &issuer{Issuers: i}
	if err := n.load(doc); err != nil {
		i.config.Log.Warn("keys not restored", "issuer", doc.Name, "error", err)
	}
	return n
}

func (n *issuer) load(doc segment.TokenIssuer) error {
	var r issuerRecord
	found, err := n.engine.folder.load(whichIssuer(doc), &r)
	if err != nil || !found {
		return err
	}
	if r.Name != doc.Name || r.Issuer != doc.Issuer || r.JWKSURI != doc.JWKSURI {
		return fmt.Errorf("the file is of issuer %q, %q", r.Name, r.Issuer)
	}
	keys, err := parseKeys(r.Keys)
	if err != nil {
		return err
	}
	n.keys, n.begun = keys, begun{r.Initial, r.Fetched}
	return nil
}

func (n *issuer) keep(doc segment.TokenIssuer, now time.Time) error {
	n.fetched = now
	if err := n.engine.folder.save(whichIssuer(doc), issuerRecord{
		Name: doc.Name, Issuer: doc.Issuer, JWKSURI: doc.JWKSURI, Initial: n.initial, Fetched: n.fetched, Keys: json.RawMessage(n.keys.text),
	}); err != nil {
		return fmt.Errorf("keep keys: %w", err)
	}
	return nil
}

func (n *issuer) begin(doc segment.TokenIssuer) error {
	err := n.with(doc.Keys, doc.KeysFile, func(document []byte) error {
		if document == nil {
			n.keys = jwks{}
			return nil
		}
		keys, err := parseKeys(document)
		if err == nil {
			n.keys = keys
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("read initial keys: %w", err)
	}
	return nil
}

func (n *issuer) ask(doc segment.TokenIssuer) fetch {
	return func(ctx context.Context) (accept, error) {
		keys, err := n.fetcher.keys(ctx, doc)
		return func() (time.Duration, error) {
			if keys != n.keys {
				n.keys = keys
				n.config.Log.Info("keys changed", "issuer", doc.Name, "keys", keys.count)
			}
			return refreshAfter(doc.Refresh, 0), nil
		}, err
	}
}

// publish tells of the keys, if they are not those that were told of last, and of the status.
func (i *Issuers) publish() {
	keys := make(map[segment.IssuerName]string)
	status := make([]IssuerStatus, 0, len(i.engine.relations))
	for _, n := range i.engine.sorted() {
		status = append(status, IssuerStatus{
			Name: n.doc.Name, Issuer: n.doc.Issuer, LastSuccess: n.party.fetched, Next: n.next, Error: n.problem(), Keys: n.party.keys.count,
		})
		if n.party.keys != (jwks{}) {
			keys[n.doc.Name] = n.party.keys.text
		}
	}
	if !maps.Equal(keys, i.published) {
		i.published = keys
		i.config.Publish(maps.Clone(keys))
	}
	i.status.Store(&status)
}
