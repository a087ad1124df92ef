package node

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity/node/nodepb"
)

const (
	tokenBytes  = 24 // of chance in a token
	maxTokens   = 1000
	maxTokenTTL = 30 * 24 * time.Hour
)

// TokenInfo is what is known of a token that has not ended.
type TokenInfo struct {
	Agent   spiffeid.ID
	Expires time.Time
	Used    time.Time // zero: it was not
}

// Tokens are the join tokens that have not ended. They stand in a file, as hashes. It is safe for concurrent use.
type Tokens struct {
	td   spiffeid.TrustDomain
	path string

	mu     sync.Mutex
	tokens []token
}

type token struct {
	Hash    string      `json:"sha256"`
	Agent   spiffeid.ID `json:"agent"`
	Expires time.Time   `json:"expires"`
	Used    time.Time   `json:"used,omitzero"`
	taken   bool        // somebody is using it
}

// errTokenRefused is all that is said to whoever presents a token.
var errTokenRefused = errors.New("the join token is not known, has ended or was used")

// reusedError is the same to him, and more to the operator.
type reusedError struct{ agent spiffeid.ID }

func (reusedError) Error() string { return errTokenRefused.Error() }
func (reusedError) Unwrap() error { return errTokenRefused }

func openTokens(path string, td spiffeid.TrustDomain) (*Tokens, error) {
	t := &Tokens{td: td, path: path}
	if err := readFile(path, &t.tokens); err != nil {
		return nil, fmt.Errorf("open join tokens: %w", err)
	}
	return t, nil
}

// Create makes a token for the agent spiffe://TRUSTDOMAIN/agent/NAME. It is kept before it is returned, and nobody can
// tell it again.
func (t *Tokens) Create(name string, ttl time.Duration) (nodepb.Token, error) {
	return t.create(name, ttl, time.Now())
}

func (t *Tokens) create(name string, ttl time.Duration, now time.Time) (nodepb.Token, error) {
	id, err := nodepb.Agent(t.td, name)
	switch {
	case err != nil:
		return "", fmt.Errorf("create join token: agent name %q: %w", name, err)
	case strings.Contains(name, "/"):
		return "", fmt.Errorf("create join token: agent name %q has a slash", name)
	case ttl <= 0 || ttl > maxTokenTTL:
		return "", fmt.Errorf("create join token: lifetime %s is not between 0 and %s", ttl, maxTokenTTL)
	}
	b := make([]byte, tokenBytes)
	if _, err := rand.Read(b); err != nil {
		return "", fmt.Errorf("create join token: %w", err)
	}
	made := nodepb.Token(base64.RawURLEncoding.EncodeToString(b))
	t.mu.Lock()
	defer t.mu.Unlock()
	next := t.valid(now)
	if len(next) >= maxTokens {
		return "", fmt.Errorf("create join token: there are %d already; wait until some have ended", len(next))
	}
	next = append(next, token{Hash: hash(made), Agent: id, Expires: now.Add(ttl).UTC().Round(0)})
	if err := t.keep(next); err != nil {
		return "", fmt.Errorf("create join token: %w", err)
	}
	return made, nil
}

// List returns the tokens that have not ended, used ones too, in the order of their making.
func (t *Tokens) List() []TokenInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	valid := t.valid(time.Now())
	list := make([]TokenInfo, len(valid))
	for i, k := range valid {
		list[i] = TokenInfo{k.Agent, k.Expires, k.Used}
	}
	return list
}

func hash(t nodepb.Token) string {
	sum := sha256.Sum256([]byte(t))
	return hex.EncodeToString(sum[:])
}

// valid returns a copy of the tokens that have not ended.
func (t *Tokens) valid(now time.Time) []token {
	return slices.DeleteFunc(slices.Clone(t.tokens), func(k token) bool { return !now.Before(k.Expires) })
}

// keep writes tokens and then puts them in force.
func (t *Tokens) keep(next []token) error {
	if err := writeFile(t.path, next); err != nil {
		return err
	}
	t.tokens = next
	return nil
}

// use has a token used up by what admit does for its agent. While it does, the token is nobody else's; if it fails,
// the token is as before. When use returns without an error, it is on the disk that the token was used.
func (t *Tokens) use(presented nodepb.Token, now time.Time, admit func(agent spiffeid.ID) error) error {
	id, err := t.take(presented, now)
	if err != nil {
		return err
	}
	err = admit(id)
	t.mu.Lock()
	defer t.mu.Unlock()
	i := t.find(presented)
	if i < 0 { // dropped meanwhile, or ended
		return errTokenRefused
	}
	if err != nil {
		t.tokens[i].taken = false
		return err
	}
	next := slices.Clone(t.tokens)
	next[i].Used, next[i].taken = now.UTC().Round(0), false
	return t.keep(next) // on an error it stays taken: whether it was written is not known
}

// take finds a token and keeps it from others.
func (t *Tokens) take(presented nodepb.Token, now time.Time) (spiffeid.ID, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := t.find(presented)
	switch {
	case i < 0 || !now.Before(t.tokens[i].Expires):
		return spiffeid.ID{}, errTokenRefused
	case t.tokens[i].taken || !t.tokens[i].Used.IsZero():
		return spiffeid.ID{}, reusedError{t.tokens[i].Agent}
	}
	t.tokens[i].taken = true
	return t.tokens[i].Agent, nil
}

// find compares the hashes in a time that says nothing of them.
func (t *Tokens) find(presented nodepb.Token) int {
	presentedHash, found := []byte(hash(presented)), -1
	for i, k := range t.tokens {
		if subtle.ConstantTimeCompare(presentedHash, []byte(k.Hash)) == 1 {
			found = i
		}
	}
	return found
}

// drop removes the tokens of an agent; from memory also if that cannot be written.
func (t *Tokens) drop(agent spiffeid.ID) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(t.tokens)
	t.tokens = slices.DeleteFunc(t.tokens, func(k token) bool { return k.Agent == agent })
	if len(t.tokens) == n {
		return nil
	}
	return writeFile(t.path, t.tokens)
}
