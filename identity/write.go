package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// X.509-SVIDs are written here and not by x509.CreateCertificate, which verifies each signature that it makes: that takes
// more than twice as long as making it. Authorities, of which there are few, are left to crypto/x509.

// The tags of DER (X.690 8.1.2) that a certificate needs.
const (
	tagInteger     = 0x02
	tagBitString   = 0x03
	tagOctetString = 0x04
	tagUTCTime     = 0x17
	tagTime        = 0x18 // GeneralizedTime
	tagSequence    = 0x30
	tagContext0    = 0x80 // a primitive [0] of RFC 5280's
	tagExplicit0   = 0xa0 // an EXPLICIT [0]
)

// What stands in every X.509-SVID that an ECDSA P-256 key signs, in DER.
var (
	version3        = []byte{tagExplicit0, 3, tagInteger, 1, 2}
	ecdsaWithSHA256 = []byte{tagSequence, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2} // RFC 5758 3.2
	noSubject       = []byte{tagSequence, 0}

	// digitalSignature alone, critical (RFC 5280 4.2.1.3)
	keyUsage = []byte{tagSequence, 14, 6, 3, 0x55, 0x1d, 15, 1, 1, 0xff, tagOctetString, 4, tagBitString, 2, 7, 0x80}
	// serverAuth and clientAuth (RFC 5280 4.2.1.12)
	extKeyUsage = []byte{tagSequence, 29, 6, 3, 0x55, 0x1d, 37, tagOctetString, 22, tagSequence, 20,
		6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1,
		6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 2}
	// cA false, which is said by leaving it out, critical (RFC 5280 4.2.1.9)
	basicConstraints = []byte{tagSequence, 12, 6, 3, 0x55, 0x1d, 19, 1, 1, 0xff, tagOctetString, 2, tagSequence, 0}

	authorityKeyID = []byte{6, 3, 0x55, 0x1d, 35}             // RFC 5280 4.2.1.1
	subjectAltName = []byte{6, 3, 0x55, 0x1d, 17, 1, 1, 0xff} // critical (RFC 5280 4.2.1.6)
)

// canWrite refuses keys that write knows no algorithm for.
func canWrite(signer crypto.Signer) error {
	if key, ok := signer.Public().(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		return errors.New("the key is not of ECDSA P-256")
	}
	return nil
}

// write returns a signed certificate in DER (RFC 5280 4.1).
func (a *Authority) write(t *Template, pub crypto.PublicKey) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	notBefore, err := writeTime(t.NotBefore)
	if err != nil {
		return nil, err
	}
	notAfter, err := writeTime(t.NotAfter)
	if err != nil {
		return nil, err
	}
	ca := a.chain[0]
	var names [][]byte
	for _, name := range t.DNSNames {
		names = append(names, element(tagContext0+2, []byte(name)))
	}
	names = append(names, element(tagContext0+6, []byte(t.ID.String())))
	extensions := [][]byte{keyUsage, extKeyUsage, basicConstraints}
	if len(ca.SubjectKeyId) > 0 {
		extensions = append(extensions, element(tagSequence, authorityKeyID,
			element(tagOctetString, element(tagSequence, element(tagContext0, ca.SubjectKeyId)))))
	}
	extensions = append(extensions, element(tagSequence, subjectAltName,
		element(tagOctetString, element(tagSequence, names...))))

	tbs := element(tagSequence, version3, writeSerial(t.SerialNumber), ecdsaWithSHA256, ca.RawSubject,
		element(tagSequence, notBefore, notAfter), noSubject, spki,
		element(tagExplicit0+3, element(tagSequence, extensions...)))
	digest := sha256.Sum256(tbs)
	signature, err := a.signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	if _, here := a.signer.(*ecdsa.PrivateKey); !here && !ecdsa.VerifyASN1(a.signer.Public().(*ecdsa.PublicKey), digest[:], signature) {
		return nil, errors.New("the signature is wrong")
	}
	return element(tagSequence, tbs, ecdsaWithSHA256, element(tagBitString, []byte{0}, signature)), nil
}

// writeSerial writes a number that is not negative: a leading zero keeps it so.
func writeSerial(n *big.Int) []byte {
	return element(tagInteger, n.FillBytes(make([]byte, n.BitLen()/8+1)))
}

// writeTime follows RFC 5280 4.1.2.5: two digits of the year until 2049, and four from then on.
func writeTime(t time.Time) ([]byte, error) {
	switch t = t.UTC(); {
	case t.Year() < 1950 || t.Year() > 9999:
		return nil, fmt.Errorf("a certificate can't be valid in the year %d", t.Year())
	case t.Year() < 2050:
		return element(tagUTCTime, t.AppendFormat(nil, "060102150405Z")), nil
	}
	return element(tagTime, t.AppendFormat(nil, "20060102150405Z")), nil
}

// element is a tag, the length in its shortest form (X.690 10.1), and the contents one after the other.
func element(tag byte, contents ...[]byte) []byte {
	n := 0
	for _, c := range contents {
		n += len(c)
	}
	der := append(make([]byte, 0, n+10), tag)
	if n < 0x80 {
		der = append(der, byte(n))
	} else {
		length := bytes.TrimLeft(binary.BigEndian.AppendUint64(nil, uint64(n)), "\x00")
		der = append(append(der, 0x80|byte(len(length))), length...)
	}
	for _, c := range contents {
		der = append(der, c...)
	}
	return der
}
