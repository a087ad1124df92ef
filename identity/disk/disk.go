// Package disk keeps the embedded authority in a folder, so that it is the same after a restart.
//
// It is for a control plane that is its own identity provider. Certificate and key stand in one file, which is
// written whole or not at all; it is never replaced, so nobody who trusted the authority loses it unasked. What is
// doubtful in the folder (wrong trust domain, a key that others can read, a torn file) is refused, never repaired.
package disk

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport.dev/identity"
	"sallyport.dev/segment"
)

const (
	// File is the name of the authority's file: its private key (PKCS #8) and its certificate chain, in PEM.
	File = "ca.pem"
	// life is how long a new authority is valid: it is not replaced before.
	life = 10 * 365 * 24 * time.Hour
)

// Open returns the authority kept in dir, or makes one where there is none. It makes dir where there is none. What
// the user must put right is returned as segment.Problems, which say how.
func Open(dir string, td spiffeid.TrustDomain, now time.Time) (*identity.Authority, error) {
	if err := openDir(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, File)
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := create(path, td, now); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("create authority: %w", err)
		}
		// Created by us or, at the same moment, by another process: what is there now is the authority.
	}
	return load(path, td, now)
}

// openDir makes the folder, or checks that nobody else gets into it.
func openDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create state folder: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("open state folder: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return problem("state-folder-open", dir, fmt.Sprintf("the folder with the authority's key is open to others (mode %04o)", mode),
			"chmod 700 "+dir)
	}
	return nil
}

func load(path string, td spiffeid.TrustDomain, now time.Time) (*identity.Authority, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	key, chain, err := parse(data)
	if err != nil {
		return nil, problem("authority-torn", path, err.Error(), startAnew(path))
	}
	a, err := identity.NewAuthority(chain, key)
	if err != nil {
		return nil, problem("authority-invalid", path, err.Error(), startAnew(path))
	}
	if a.TrustDomain() != td {
		return nil, problem("authority-trust-domain", path,
			fmt.Sprintf("the authority is %s's, but the trust domain is %s", a.TrustDomain(), td),
			fmt.Sprintf("set the trust domain back to %s, or use another state folder for %s", a.TrustDomain(), td))
	}
	cert := a.Certificate()
	switch {
	case now.After(cert.NotAfter):
		return nil, problem("authority-expired", path, "the authority ended at "+cert.NotAfter.Format(time.RFC3339), startAnew(path))
	case now.Before(cert.NotBefore):
		return nil, problem("authority-not-begun", path, "the authority begins only at "+cert.NotBefore.Format(time.RFC3339), "set this machine's clock")
	}
	return a, nil
}

// read returns the file's content if nobody but its owner could have read it. It asks the open file, so it cannot be
// exchanged between the question and the reading.
func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open authority: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open authority: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, problem("authority-invalid", path, "not a file", startAnew(path))
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, problem("authority-readable", path, fmt.Sprintf("others may have read the authority's private key (mode %04o)", mode),
			"if nobody has: chmod 600 "+path+"; otherwise "+startAnew(path))
	}
	data := make([]byte, info.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		return nil, fmt.Errorf("read authority: %w", err)
	}
	return data, nil
}

// parse reads a key and a chain. Its errors never contain what was read.
func parse(data []byte) (crypto.Signer, []*x509.Certificate, error) {
	var key crypto.Signer
	var chain []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case "PRIVATE KEY":
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, nil, errors.New("the private key cannot be read")
			}
			signer, ok := k.(crypto.Signer)
			if !ok || key != nil {
				return nil, nil, errors.New("there is not one private key for signing")
			}
			key = signer
		case "CERTIFICATE":
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, nil, fmt.Errorf("a certificate cannot be read: %w", err)
			}
			chain = append(chain, c)
		}
	}
	switch {
	case key == nil && chain == nil:
		return nil, nil, errors.New("there is neither a key nor a certificate")
	case key == nil:
		return nil, nil, errors.New("there is a certificate without its key")
	case chain == nil:
		return nil, nil, errors.New("there is a key without its certificate")
	}
	return key, chain, nil
}

// create makes an authority and writes it; fs.ErrExist if there is one.
func create(path string, td spiffeid.TrustDomain, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template, err := identity.CATemplate(td, life, now, rand.Reader)
	if err != nil {
		return err
	}
	a, err := identity.SelfSign(template, key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return write(path, append(
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw})...))
}

// write puts a whole file, on the disk, where none is. A link, unlike a rename, never replaces.
func write(path string, data []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".ca-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// startAnew is the way out that always works, and its price.
func startAnew(path string) string {
	return "restore " + path + " from a backup, or move it away: a new authority is then made, and whoever trusts this one must get the new bundle"
}

func problem(code, path, msg, hint string) error {
	return segment.Problems{{Code: code, Pos: segment.Pos{File: path}, Msg: msg, Hint: hint}}
}
