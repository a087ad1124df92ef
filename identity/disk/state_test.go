package disk

import (
	"bytes"
	"crypto/sha256"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// FuzzDecode reads what has the right checksum and nothing else right. What is accepted has somebody to trust, and is
// the same after it was written.
func FuzzDecode(f *testing.F) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	dir := filepath.Join(f.TempDir(), "state")
	k, err := OpenKeeper(f.Context(), Config{Dir: dir, TrustDomain: td})
	if err != nil {
		f.Fatal(err)
	}
	k.Close()
	data, err := os.ReadFile(filepath.Join(dir, File))
	if err != nil {
		f.Fatal(err)
	}
	_, body := pem.Decode(data)
	f.Add("1", body)
	f.Add("0", body[bytes.LastIndex(body, []byte("-----BEGIN")):])
	f.Add("18446744073709551616", bytes.ReplaceAll(body, []byte("Slot: root"), []byte("Slot: jwt")))
	f.Add("-1", bytes.ReplaceAll(body, []byte("Prepared: 2"), []byte("Prepared: x")))
	f.Add("7", append(bytes.Clone(body), body...))
	now := time.Now()
	f.Fuzz(func(t *testing.T, sequence string, body []byte) {
		sum := sha256.Sum256(body)
		head := pem.EncodeToMemory(&pem.Block{Type: typeHead, Bytes: sum[:],
			Headers: map[string]string{"Version": "1", "Trust-Domain": td.Name(), "Sequence": sequence}})
		s, err := decode(append(head, body...), now)
		if err != nil {
			return
		}
		if len(s.roots) == 0 || s.td != td {
			t.Fatal("trusts nobody")
		}
		again, err := s.encode()
		if err != nil {
			t.Fatal(err)
		}
		o, err := decode(again, now)
		if err != nil || !o.bundle().Equal(s.bundle()) {
			t.Fatalf("it is another one when it was written: %v", err)
		}
	})
}
