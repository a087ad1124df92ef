package provider

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"errors"
	"maps"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// jwtState is what was last got of JWT bundles. It is immutable, but for changed, which is closed when there are others.
type jwtState struct {
	bundles map[spiffeid.TrustDomain]*jwtbundle.Bundle
	err     error // of the last attempt; nil if that gave the bundles
	changed chan struct{}
}

// JWTBundles returns the keys that verify JWT-SVIDs, of the own and of federated trust domains (Workload API, 6.2.2);
// nobody can be authenticated by a JWT-SVID of a trust domain that is not there. They may not be changed. The channel is
// closed when they are others. They come apart from X.509: a provider need not give both (Workload API, 1).
func (s *Source) JWTBundles() (bundles map[spiffeid.TrustDomain]*jwtbundle.Bundle, changed <-chan struct{}) {
	st := s.jwt.Load()
	return st.bundles, st.changed
}

// takeJWT puts an answer in the place of what was before. It is called by Run's goroutine only.
func (s *Source) takeJWT(a answer[*jwtbundle.Set]) {
	before := s.jwt.Load()
	next := jwtState{before.bundles, a.err, before.changed}
	if a.err == nil {
		if bundles, err := usable(a.got); err == nil {
			next.bundles = bundles
		} else {
			next.err = err
		}
	}
	switch status.Code(next.err) {
	case codes.PermissionDenied, codes.Unimplemented:
		next.bundles = nil // there are none for us, whatever there was
	}
	changed := !maps.EqualFunc(before.bundles, next.bundles, (*jwtbundle.Bundle).Equal)
	switch {
	case next.err == nil && changed:
		s.config.Log.Info("JWT bundles received", "provider", s.config.Addr, "trust_domains", len(next.bundles))
	// What fails the same way again is no news.
	case next.err != nil && (before.err == nil || before.err.Error() != next.err.Error()):
		s.config.Log.Warn("JWT bundles not received", "provider", s.config.Addr, "held", len(next.bundles), "error", next.err)
	}
	if changed {
		next.changed = make(chan struct{})
	}
	s.jwt.Store(&next)
	if changed {
		close(before.changed)
	}
}

// usable is the bundles without what is no public key that JWT-SVIDs are signed with (JWT-SVID, 2.1 and 6.1), and
// without trust domains that have no other. An answer without any bundle is none (Workload API, 4.5).
func usable(got *jwtbundle.Set) (map[spiffeid.TrustDomain]*jwtbundle.Bundle, error) {
	if got.Len() == 0 {
		return nil, errors.New("the answer has no bundle")
	}
	bundles := make(map[spiffeid.TrustDomain]*jwtbundle.Bundle)
	for _, b := range got.Bundles() {
		for id, key := range b.JWTAuthorities() {
			switch key.(type) {
			case *ecdsa.PublicKey, *rsa.PublicKey:
			default:
				b.RemoveJWTAuthority(id)
			}
		}
		if !b.Empty() {
			bundles[b.TrustDomain()] = b
		}
	}
	return bundles, nil
}

// jwtWatcher is a watcher as go-spiffe wants it.
type jwtWatcher struct{ watcher[*jwtbundle.Set] }

func (w jwtWatcher) OnJWTBundlesUpdate(got *jwtbundle.Set) { w.got(got) }
func (w jwtWatcher) OnJWTBundlesWatchError(err error)      { w.failed(err) }
