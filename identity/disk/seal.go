package disk

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"strconv"
)

// Key is what a folder's file is encrypted with: at least MinKey random bytes. The zero value is none. It prints as
// [redacted].
type Key struct{ secret []byte }

// MinKey is the shortest key. It is stretched to a cipher's key, and not in a way that would make up for a password.
const MinKey = 32

// IsZero reports whether there is no key.
func (k Key) IsZero() bool { return len(k.secret) == 0 }

// String and GoString tell nothing.
func (Key) String() string { return "[redacted]" }

// GoString is for %#v.
func (Key) GoString() string { return "[redacted]" }

// ReadKey reads a key from a file that only its owner and its group may read. Spaces around it are not part of it.
func ReadKey(path string) (Key, error) {
	data, err := readGiven(path, 0o007, "name a file with the key by --ca-key-file") // a group is how orchestrators give a file to a process
	if err != nil {
		return Key{}, err
	}
	return NewKey(data, path)
}

// NewKey checks a key. Spaces around it are not part of it. from is where the user gave it.
func NewKey(data []byte, from string) (Key, error) {
	secret := bytes.TrimSpace(data)
	if len(secret) < MinKey {
		return Key{}, problem("authority-key-short", from, fmt.Sprintf("the key has %d bytes, fewer than %d", len(secret), MinKey),
			"make one with: openssl rand -base64 48")
	}
	return Key{secret}, nil
}

// A sealed file is one PEM block. Its headers say how the rest is encrypted, and are authenticated with it.
const (
	typeSealed   = "ENCRYPTED SALLYPORT AUTHORITY"
	sealCipher   = "AES-256-GCM"
	sealKey      = "HKDF-SHA256"
	sealPreamble = "Sallyport keeps the authority of a trust domain here, encrypted with the key of --ca-key-file or $SALLYPORT_CA_KEY.\n\n"
)

func isSealed(data []byte) bool {
	b, _ := pem.Decode(data)
	return b != nil && b.Type == typeSealed
}

func seal(plain []byte, key Key) ([]byte, error) {
	salt := make([]byte, 32) // another one, and so another cipher's key, each time
	if _, err := rand.Read(salt); err != nil {
		return nil, err
	}
	aead, check, err := derive(key, salt)
	if err != nil {
		return nil, err
	}
	h := map[string]string{"Version": fileVersion, "Cipher": sealCipher, "Key-Derivation": sealKey,
		"Salt": hex.EncodeToString(salt), "Key-Check": check}
	return append([]byte(sealPreamble), pem.EncodeToMemory(&pem.Block{Type: typeSealed, Headers: h,
		Bytes: aead.Seal(nil, nil, plain, authenticated(h))})...), nil //nolint:gosec // this cipher makes its nonces itself
}

// unseal reads what seal wrote. The errors are the user's to mend.
func unseal(data []byte, key Key, path string) ([]byte, error) {
	b, _ := pem.Decode(data)
	if h := b.Headers; h["Version"] != fileVersion || h["Cipher"] != sealCipher || h["Key-Derivation"] != sealKey {
		return nil, problem("authority-torn", path, "it is encrypted in a way that this program does not know", startAnew(path))
	}
	if key.IsZero() {
		return nil, problem("authority-encrypted", path, "the authority is encrypted, and no key is given",
			"give the key that it was encrypted with by --ca-key-file PATH or $SALLYPORT_CA_KEY")
	}
	salt, err := hex.DecodeString(b.Headers["Salt"])
	if err != nil || len(salt) != 32 {
		return nil, problem("authority-torn", path, "its salt cannot be read", startAnew(path))
	}
	aead, check, err := derive(key, salt)
	if err != nil {
		return nil, fmt.Errorf("decrypt authority: %w", err)
	}
	if check != b.Headers["Key-Check"] {
		return nil, problem("authority-wrong-key", path, "the authority is encrypted with another key than the one given",
			"give the key that it was encrypted with by --ca-key-file PATH or $SALLYPORT_CA_KEY")
	}
	plain, err := aead.Open(nil, nil, b.Bytes, authenticated(b.Headers))
	if err != nil {
		return nil, problem("authority-torn", path, "it was changed since it was encrypted", startAnew(path))
	}
	return plain, nil
}

// authenticated are the headers in one form.
func authenticated(h map[string]string) []byte {
	var b []byte
	for _, name := range []string{"Version", "Cipher", "Key-Derivation", "Salt", "Key-Check"} {
		b = strconv.AppendQuote(b, h[name])
	}
	return b
}

// derive makes a cipher's key of the user's (RFC 5869), and a value that tells one key from another and nothing more.
func derive(key Key, salt []byte) (aead cipher.AEAD, check string, err error) {
	k, err := hkdf.Key(sha256.New, key.secret, salt, "sallyport.dev authority file v1: encryption", 32)
	if err != nil {
		return nil, "", err
	}
	c, err := hkdf.Key(sha256.New, key.secret, salt, "sallyport.dev authority file v1: which key", 8)
	if err != nil {
		return nil, "", err
	}
	block, err := aes.NewCipher(k)
	if err != nil {
		return nil, "", err
	}
	aead, err = cipher.NewGCMWithRandomNonce(block)
	return aead, hex.EncodeToString(c), err
}
