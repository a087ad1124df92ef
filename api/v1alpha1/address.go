package v1alpha1

import (
	"net"
	"net/netip"
	"strconv"
	"strings"

	"sallyport.dev/segment"
)

const (
	labelLetters = "abcdefghijklmnopqrstuvwxyz0123456789-"
	nameLetters  = labelLetters + "ABCDEFGHIJKLMNOPQRSTUVWXYZ_."
	labelHint    = "a name is at most 63 lower-case letters, digits and dashes, and begins and ends with a letter or digit"
)

// isLabel reports whether s is a DNS-1123 label.
func isLabel(s string) bool {
	return len(s) > 0 && len(s) <= 63 && s[0] != '-' && s[len(s)-1] != '-' && strings.Trim(s, labelLetters) == ""
}

// notDNS says why a lower-case s is not a DNS name (RFC 1123, section 2.1), or returns "".
func notDNS(s string) string {
	if _, err := netip.ParseAddr(s); err == nil {
		return "it is an IP address"
	}
	switch {
	case strings.Contains(s, "*"):
		return "there are no wildcards here"
	case len(s) > 253:
		return "it is longer than 253 letters"
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if !isLabel(l) {
			return "it is not a DNS name"
		}
	}
	// Resolvers read 127.1, 2130706433 and 0x7f000001 as addresses (WHATWG URL, section 3.5: ends in a number).
	last := labels[len(labels)-1]
	if strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x") {
		return "it ends in a number"
	}
	return ""
}

// parseAddress reads "host:port", or says why it cannot.
func parseAddress(s string) (segment.Address, string) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return segment.Address{}, "it is not host:port"
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil || number == 0 {
		return segment.Address{}, "a port is a number from 1 to 65535"
	}
	address := segment.Address{Host: strings.ToLower(host), Port: uint16(number)}
	if ip, err := netip.ParseAddr(host); err == nil {
		ip = ip.Unmap()
		if ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() {
			return segment.Address{}, "it is not the address of one server"
		}
		address.Host = ip.String()
		return address, ""
	}
	return address, notDNS(address.Host)
}

// isLoopback reports whether what is sent to the host never leaves the machine.
func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback() || host == "localhost"
}
