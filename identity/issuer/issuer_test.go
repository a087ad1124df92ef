package issuer_test

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/segment"
)

func entry(name string, selectors ...segment.Selector) issuer.Entry {
	e := identitytest.Entry(name, selectors...)
	e.TTL = time.Minute
	return e
}

func unix(value string) segment.Selector { return segment.Selector{Type: "unix", Value: value} }

// parse reads "unix:uid:1 unix:path:/a".
func parse(text string) []segment.Selector {
	var selectors []segment.Selector
	for s := range strings.FieldsSeq(text) {
		kind, value, _ := strings.Cut(s, ":")
		selectors = append(selectors, segment.Selector{Type: kind, Value: value})
	}
	return selectors
}

func newIssuer(t *testing.T, attest func(context.Context, []string) ([]segment.Selector, error)) *issuer.Issuer {
	t.Helper()
	return identitytest.Issuer(identitytest.Authority(t), attest)
}

// seen attests every caller as having these selectors.
func seen(text string) func(context.Context, []string) ([]segment.Selector, error) {
	return func(context.Context, []string) ([]segment.Selector, error) { return parse(text), nil }
}

func TestMatch(t *testing.T) {
	entries := []issuer.Entry{
		entry("anyone"), // no selectors: never
		entry("user", unix("uid:1000")),
		entry("app", unix("uid:1000"), unix("path:/bin/app")),
		entry("other", unix("uid:1001")),
		entry("user", unix("path:/bin/app")), // a second way to be the same
		entry("k8s", segment.Selector{Type: "k8s", Value: "uid:1000"}),
	}
	for _, c := range []struct{ have, want string }{
		{"", ""},
		{"unix:uid:1000", "/user"},
		{"unix:uid:1000 unix:gid:7", "/user"},
		{"unix:path:/bin/app unix:uid:1000", "/user /app"},
		{"unix:path:/bin/app", "/user"},
		{"unix:path:/bin/app unix:uid:1001", "/other /user"},
		{"unix:uid:10000", ""},
		{"unix:gid:1000", ""},
		{"k8s:uid:1000", "/k8s"},
	} {
		var got []string
		for _, e := range issuer.Match(entries, parse(c.have)) {
			got = append(got, e.ID.Path())
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%q is %q, want %q", c.have, s, c.want)
		}
	}
}

func TestNobodyWithoutEntries(t *testing.T) {
	i := newIssuer(t, seen("unix:uid:1000"))
	check := func(want string) {
		t.Helper()
		view, err := i.Entitled(t.Context())
		var denied *issuer.NoIdentityError
		if !errors.As(err, &denied) || len(view.Entries) != 0 || view.Bundles.Own != nil {
			t.Fatalf("got %+v, %v", view, err)
		}
		if s := status.Convert(err); s.Code() != codes.PermissionDenied || s.Message() != want {
			t.Errorf("got %v %q, want %q", s.Code(), s.Message(), want)
		}
	}
	check("no identity: no workload is recognised by unix:uid:1000")
	i.Set([]issuer.Entry{entry("secret-app", unix("uid:5"))})
	check("no identity: no workload is recognised by unix:uid:1000")
}

func TestNobodyUnattested(t *testing.T) {
	gone := errors.New("the process is gone")
	i := newIssuer(t, func(context.Context, []string) ([]segment.Selector, error) { return parse("unix:uid:1000"), gone })
	i.Set([]issuer.Entry{entry("app", unix("uid:1000"))})
	if _, err := i.Entitled(t.Context()); !errors.Is(err, gone) || status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v", err)
	}
}

func TestOnlyWhatIsAskedFor(t *testing.T) {
	var asked []string
	i := newIssuer(t, func(_ context.Context, kinds []string) ([]segment.Selector, error) {
		asked = kinds
		return parse("unix:uid:1000"), nil
	})
	for _, c := range []struct{ selectors, want string }{
		{"unix:uid:1000", "unix:uid"},
		{"unix:uid:1000 unix:sha256:abc unix:uid:1001", "unix:sha256 unix:uid"},
		{"unix:path:sha256:", "unix:path"},
		{"systemd:unit:rag@a:b.service", "systemd:unit"},
	} {
		i.Set([]issuer.Entry{entry("app", parse(c.selectors)...), entry("none")})
		_, _ = i.Entitled(t.Context()) // whatever the answer is
		if got := strings.Join(asked, " "); got != c.want {
			t.Errorf("%s: asked for %q", c.selectors, got)
		}
	}
}

func TestViewSaysWhenItChanges(t *testing.T) {
	i := newIssuer(t, seen("unix:uid:1000"))
	i.Set([]issuer.Entry{entry("app", unix("uid:1000"))})
	view, err := i.Entitled(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-view.Changed:
		t.Fatal("changed before it did")
	default:
	}
	i.Set(nil)
	<-view.Changed
	if _, err := i.Entitled(t.Context()); err == nil {
		t.Error("still entitled")
	}
	if _, err := i.CertifyX509(t.Context(), view.Entries[0], issuer.HeldKey(newKey(t))); err == nil {
		t.Error("an entry that is gone is signed for")
	}
}

// Most generations change nothing here: nobody is woken, and attested again, for these.
func TestEqualEntriesChangeNothing(t *testing.T) {
	entries := func() []issuer.Entry {
		app := entry("app", unix("uid:1000"), unix("path:/bin/app"))
		app.DNSNames = []string{"app.internal"}
		return []issuer.Entry{app, entry("db", unix("uid:1001"))}
	}
	for _, c := range []struct {
		name   string
		change func([]issuer.Entry) []issuer.Entry
		want   bool
	}{
		{"nothing", func(e []issuer.Entry) []issuer.Entry { return e }, false},
		{"ID", func(e []issuer.Entry) []issuer.Entry { e[1].ID = e[0].ID; return e }, true},
		{"selector", func(e []issuer.Entry) []issuer.Entry { e[0].Selectors[1] = unix("path:/bin/b"); return e }, true},
		{"name", func(e []issuer.Entry) []issuer.Entry { e[0].DNSNames[0] = "b.internal"; return e }, true},
		{"lifetime", func(e []issuer.Entry) []issuer.Entry { e[1].TTL++; return e }, true},
		{"order", func(e []issuer.Entry) []issuer.Entry { slices.Reverse(e); return e }, true},
		{"one less", func(e []issuer.Entry) []issuer.Entry { return e[:1] }, true},
	} {
		i := newIssuer(t, seen("unix:uid:1000 unix:path:/bin/app"))
		i.Set(entries())
		view, err := i.Entitled(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		i.Set(c.change(entries()))
		var changed bool
		select {
		case <-view.Changed:
			changed = true
		default:
		}
		if changed != c.want {
			t.Errorf("%s: changed %t", c.name, changed)
		}
	}
}

// serials are the serial numbers of what a wallet holds.
func serials(w *issuer.Wallet) []string {
	var s []string
	for _, svid := range w.SVIDs() {
		s = append(s, svid.Certificates[0].SerialNumber.Text(16))
	}
	return s
}

func TestWallet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, nil)
		a, b := entry("a", unix("uid:1")), entry("b", unix("uid:1"))
		b.TTL = time.Hour
		i.Set([]issuer.Entry{a, b})
		var w issuer.Wallet
		if w.Due() != nil {
			t.Error("an empty wallet is due")
		}
		renew := func(want bool, entries ...issuer.Entry) []string {
			t.Helper()
			changed, err := w.Renew(t.Context(), i, entries, nil)
			if err != nil || changed != want {
				t.Fatalf("changed %t, %v", changed, err)
			}
			for n, svid := range w.SVIDs() {
				if svid.ID != entries[n].ID {
					t.Fatalf("%s in the place of %s", svid.ID, entries[n].ID)
				}
				if !svid.PrivateKey.(*ecdsa.PrivateKey).PublicKey.Equal(svid.Certificates[0].PublicKey) {
					t.Fatal("key and certificate differ")
				}
			}
			return serials(&w)
		}
		first := renew(true, a, b)
		if again := renew(false, a, b); !slices.Equal(first, again) {
			t.Error("renewed without need")
		}
		if swapped := renew(true, b, a); swapped[0] != first[1] || swapped[1] != first[0] {
			t.Error("another order makes other SVIDs")
		}
		renew(true, a, b)

		begun := time.Now()
		<-w.Due()
		if d := time.Since(begun); d < 20*time.Second || d > 37*time.Second {
			t.Errorf("a one-minute SVID is due after %s", d)
		}
		second := renew(true, a, b)
		if second[0] == first[0] || second[1] != first[1] {
			t.Errorf("at a's half life: %v, then %v", first, second)
		}

		a.DNSNames = []string{"a.internal"}
		third := renew(true, a, b)
		if third[0] == second[0] || third[1] != second[1] {
			t.Errorf("after a's change: %v, then %v", second, third)
		}
		if names := w.SVIDs()[0].Certificates[0].DNSNames; !slices.Equal(names, a.DNSNames) {
			t.Errorf("names %q", names)
		}

		stranger := entry("stranger", unix("uid:1"))
		if changed, err := w.Renew(t.Context(), i, []issuer.Entry{a, stranger}, nil); err == nil || changed {
			t.Errorf("got an SVID without an entry: %t, %v", changed, err)
		}
		if got := serials(&w); !slices.Equal(got, third) {
			t.Error("an error changed the wallet")
		}
		renew(true, b)
		renew(true)
	})
}
