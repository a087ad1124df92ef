package federation

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// SPIFFETLS is how a server of the profile https_spiffe shows itself (SPIFFE Federation, 5.2.2.3): by its X.509-SVID,
// which is asked for at each handshake. It asks no client for a certificate.
func SPIFFETLS(svid x509svid.Source) *tls.Config { return tlsconfig.TLSServerConfig(svid) }

// WebTLS is how a server of the profile https_web shows itself (SPIFFE Federation, 5.2.1.3): by a certificate for its
// host name. Both files are PEM and are read now, and again when they have changed; while they can't be read or don't
// belong together, the last good certificate stays. It asks no client for a certificate.
func WebTLS(certFile, keyFile string, log *slog.Logger) (*tls.Config, error) {
	w := &webCertificate{certFile: certFile, keyFile: keyFile, log: log}
	if err := w.load(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:     tls.VersionTLS12, // what Mozilla calls intermediate
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return w.get(time.Now()), nil },
	}, nil
}

// webCertificate is a certificate in files that somebody else renews.
type webCertificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu      sync.Mutex
	held    *tls.Certificate
	stamps  [2]stamp  // of the files when they were last read
	looked  time.Time // when the files were last looked at
	failure string    // why they could not be read, which is logged once
}

// stamp tells a file from the one that was there before.
type stamp struct {
	file os.FileInfo // nil: none
}

func stampOf(path string) stamp {
	info, err := os.Stat(path)
	if err != nil {
		return stamp{}
	}
	return stamp{info}
}

func (s stamp) equal(o stamp) bool {
	if s.file == nil || o.file == nil {
		return s.file == o.file
	}
	return os.SameFile(s.file, o.file) && s.file.ModTime().Equal(o.file.ModTime()) && s.file.Size() == o.file.Size()
}

// lookEvery is how often the files are looked at, however many clients come.
const lookEvery = time.Second

// get returns the certificate in force.
func (w *webCertificate) get(now time.Time) *tls.Certificate {
	w.mu.Lock()
	defer w.mu.Unlock()
	if now.Sub(w.looked).Abs() < lookEvery {
		return w.held
	}
	w.looked = now
	if w.failure == "" && w.stamps[0].equal(stampOf(w.certFile)) && w.stamps[1].equal(stampOf(w.keyFile)) {
		return w.held
	}
	switch err := w.load(); {
	case err == nil:
		w.failure = ""
		w.log.Info("web certificate read", "path", w.certFile, "until", w.held.Leaf.NotAfter)
	case err.Error() != w.failure:
		w.failure = err.Error()
		w.log.Warn("web certificate not read, the last one stays", "path", w.certFile, "error", err)
	}
	return w.held
}

func (w *webCertificate) load() error {
	// Before the reading: what changes during it is read again.
	stamps := [2]stamp{stampOf(w.certFile), stampOf(w.keyFile)}
	c, err := tls.LoadX509KeyPair(w.certFile, w.keyFile)
	if err != nil {
		return fmt.Errorf("read web certificate: %w", err)
	}
	w.held, w.stamps = &c, stamps
	return nil
}
