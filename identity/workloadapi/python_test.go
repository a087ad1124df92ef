package workloadapi_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
)

// TestPython runs a program that knows the API from SPIFFE's library for Python (the package spiffe, in .parts).
func TestPython(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a Python with the package spiffe")
	}
	python, err := filepath.Abs("../../.parts/venv/bin/python")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(python); err != nil {
		t.Fatalf("%v: make parts installs it", err)
	}
	_, p := start(t)
	app, db := identitytest.Entry("app", identitytest.Me()), identitytest.Entry("db", identitytest.Me())
	authorities := federate(t, p, &app, "other.org")
	p.Issuer.Set([]issuer.Entry{app, identitytest.Entry("other", notMe()), db})
	forged := identitytest.Authorities(t, "example.org")
	cmd := exec.CommandContext(t.Context(), python, "testdata/client.py",
		tokenOf(t, p.Authorities, "spiffe://example.org/db"), tokenOf(t, authorities["other.org"], "spiffe://other.org/app"),
		tokenOf(t, forged, "spiffe://example.org/db"))
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+p.Socket, "PYTHONDONTWRITEBYTECODE=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}

	said := make(map[string]any)
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		var line [2]any
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Errorf("%s: %v", lines.Text(), err)
			continue
		}
		said[line[0].(string)] = line[1]
		if line[0] == "watching" { // a root and a key are added
			next := p.Authorities
			next.JWT = identitytest.JWTAuthority(t, "example.org", "second")
			own := p.Authorities.Bundle.Clone()
			own.AddX509Authority(forged.X509.Certificate())
			if err := own.AddJWTAuthority("second", next.JWT.PublicKey()); err != nil {
				t.Error(err)
			}
			p.Certifier.Set(next)
			p.Issuer.SetBundles(issuer.Bundles{Own: own, Federated: map[spiffeid.TrustDomain]*spiffebundle.Bundle{
				spiffeid.RequireTrustDomainFromString("other.org"): authorities["other.org"].Bundle,
			}})
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, stderr.String())
	}
	for name, want := range map[string]string{
		"fetch_jwt_svid of another":        "StatusCode.PERMISSION_DENIED",
		"validate_jwt_svid of a bad token": "its signature is not the key's (StatusCode.INVALID_ARGUMENT)",
		"validate_jwt_svid for another":    `it is not for audience ["cache"] (StatusCode.INVALID_ARGUMENT)`,
	} {
		if got, _ := said[name].(string); !strings.Contains(got, want) {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
		delete(said, name)
	}
	const appID, dbID, otherID = "spiffe://example.org/app", "spiffe://example.org/db", "spiffe://other.org/app"
	roots := map[string]any{"example.org": 1.0, "other.org": 1.0}
	keys := map[string]any{"example.org": []any{"first"}, "other.org": []any{"first"}}
	want := map[string]any{
		"fetch_x509_svid":                    appID,
		"fetch_x509_svids":                   []any{appID, dbID},
		"fetch_x509_bundles":                 roots,
		"fetch_x509_context":                 roots,
		"fetch_jwt_svid":                     []any{appID, []any{"db"}},
		"fetch_jwt_svid of one":              []any{dbID, []any{"cache", "db"}},
		"fetch_jwt_svids":                    []any{appID, dbID},
		"fetch_jwt_bundles":                  keys,
		"validate_jwt_svid of our token":     []any{dbID, dbID},
		"validate_jwt_svid of their token":   []any{otherID, otherID},
		"validate_jwt_svid of fetched token": []any{appID, appID},
		"X509Source":                         []any{appID, roots},
		"JwtSource":                          []any{appID, keys},
		"watching":                           nil,
		"X509Source was pushed":              map[string]any{"example.org": 2.0, "other.org": 1.0},
		"JwtSource was pushed":               map[string]any{"example.org": []any{"first", "second"}, "other.org": []any{"first"}},
		"JwtSource after it":                 appID,
	}
	if diff := cmp.Diff(want, said); diff != "" {
		t.Error(diff)
	}
}
