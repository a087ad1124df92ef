package svidfile_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport.dev/identity"
	"sallyport.dev/identity/internal/identitytest"
	"sallyport.dev/identity/issuer"
	"sallyport.dev/identity/svidfile"
	"sallyport.dev/identity/workloadapi"
)

func serve(t *testing.T) (svidfile.Config, *issuer.Issuer) {
	t.Helper()
	socket, i := identitytest.Serve(t, func(s grpc.ServiceRegistrar, i *issuer.Issuer) { workloadapi.Register(s, i) })
	return svidfile.Config{
		Addr: "unix://" + socket,
		Dir:  filepath.Join(t.TempDir(), "made", "svid"),
		Log:  slog.New(slog.NewTextHandler(io.Discard, nil)),
	}, i
}

// load reads a folder as an application does, and checks that it is one valid SVID.
func load(t *testing.T, dir string) *x509svid.SVID {
	t.Helper()
	svid, err := x509svid.Load(filepath.Join(dir, svidfile.SVIDFile), filepath.Join(dir, svidfile.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := x509bundle.Load(spiffeid.RequireTrustDomainFromString("example.org"), filepath.Join(dir, svidfile.BundleFile))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.Verify(svid.Certificates, bundle, time.Now()); err != nil {
		t.Fatal(err)
	}
	return svid
}

func TestFetch(t *testing.T) {
	c, i := serve(t)
	app, db := identitytest.Entry("app", identitytest.Me()), identitytest.Entry("db", identitytest.Me())
	i.Set([]issuer.Entry{app, db})
	got, err := svidfile.Fetch(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if svid := load(t, c.Dir); svid.ID != app.ID || !svid.Certificates[0].Equal(got.Certificates[0]) {
		t.Errorf("wrote %s", svid.ID)
	}
	c.ID = db.ID
	if _, err := svidfile.Fetch(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if svid := load(t, c.Dir); svid.ID != db.ID {
		t.Errorf("wrote %s", svid.ID)
	}
	c.ID = spiffeid.RequireFromString("spiffe://example.org/none")
	if _, err := svidfile.Fetch(t.Context(), c); err == nil || !strings.Contains(err.Error(), "no such identity") {
		t.Errorf("got %v", err)
	}
	i.Set(nil)
	if _, err := svidfile.Fetch(t.Context(), c); status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v", err)
	}
	load(t, c.Dir) // still there
}

func TestModesAndLeftovers(t *testing.T) {
	c, i := serve(t)
	i.Set([]issuer.Entry{identitytest.Entry("app", identitytest.Me())})
	for range 5 {
		if _, err := svidfile.Fetch(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	files, folders := 0, 0
	if err := filepath.WalkDir(c.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch mode := info.Mode(); {
		case mode.IsDir():
			folders++
			if mode.Perm() != 0o700 {
				t.Errorf("%s: %v", path, mode)
			}
		case mode.IsRegular():
			files++
			if mode.Perm() != 0o600 {
				t.Errorf("%s: %v", path, mode)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if folders != 3 || files != 6 { // the folder, this generation and the one before
		t.Errorf("%d folders with %d files", folders, files)
	}
}

// A reader that resolves the folder once never sees a mixed pair, however often it is written.
func TestNeverMixed(t *testing.T) {
	c, i := serve(t)
	i.Set([]issuer.Entry{identitytest.Entry("app", identitytest.Me())})
	var svids []*x509svid.SVID
	for range 2 {
		svid, err := svidfile.Fetch(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		svids = append(svids, svid)
	}
	bundle, err := x509bundle.Load(svids[0].ID.TrustDomain(), filepath.Join(c.Dir, svidfile.BundleFile))
	if err != nil {
		t.Fatal(err)
	}
	generation, err := filepath.EvalSymlinks(filepath.Join(c.Dir, "current"))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := os.ReadFile(filepath.Join(generation, svidfile.SVIDFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := svidfile.Write(c.Dir, svids[0], bundle); err != nil { // between the reader's two files
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(generation, svidfile.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x509svid.Parse(chain, key); err != nil {
		t.Error(err)
	}
	if svid := load(t, c.Dir); !svid.Certificates[0].Equal(svids[0].Certificates[0]) {
		t.Error("the last one written is not in force")
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	c, i := serve(t)
	app := identitytest.Entry("app", identitytest.Me())
	app.TTL = identity.MinTTL
	i.Set([]issuer.Entry{app})
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	changes, err := fsnotify.NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	defer changes.Close()
	if err := changes.Add(c.Dir); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- svidfile.Watch(ctx, c) }()
	written := func() *x509svid.SVID {
		for {
			select {
			case e := <-changes.Events:
				if filepath.Base(e.Name) == "current" && e.Has(fsnotify.Create) {
					return load(t, c.Dir)
				}
			case err := <-done:
				t.Fatal(err)
			}
		}
	}
	first := written()
	if second := written(); second.Certificates[0].Equal(first.Certificates[0]) {
		t.Error("written without need")
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestWatchEndsWhereItCannotWrite(t *testing.T) {
	c, i := serve(t)
	i.Set([]issuer.Entry{identitytest.Entry("app", identitytest.Me())})
	c.Dir = filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(c.Dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := svidfile.Watch(t.Context(), c); err == nil || !strings.Contains(err.Error(), "write SVID") {
		t.Errorf("got %v", err)
	}
}
