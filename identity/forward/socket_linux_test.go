package forward

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

const header = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"

// line is a row as the kernel writes it.
func line(r row) string {
	return fmt.Sprintf("   0: %s %s 01 00000000:00000000 00:00000000 00000000 %5d        0 %d 1 0000000000000000 20 4 30 10 -1\n",
		hexAddr(r.local), hexAddr(r.remote), r.uid, r.inode)
}

func hexAddr(a netip.AddrPort) string {
	var text strings.Builder
	for b := a.Addr().AsSlice(); len(b) > 0; b = b[4:] {
		fmt.Fprintf(&text, "%08X", binary.NativeEndian.Uint32(b))
	}
	return fmt.Sprintf("%s:%04X", &text, a.Port())
}

func addrPorts() *rapid.Generator[netip.AddrPort] {
	return rapid.Custom(func(t *rapid.T) netip.AddrPort {
		size := rapid.SampledFrom([]int{4, 16}).Draw(t, "size")
		addr, _ := netip.AddrFromSlice(rapid.SliceOfN(rapid.Byte(), size, size).Draw(t, "addr"))
		return netip.AddrPortFrom(addr.Unmap(), rapid.Uint16().Draw(t, "port"))
	})
}

func TestParseRow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := row{
			local: addrPorts().Draw(t, "local"), remote: addrPorts().Draw(t, "remote"),
			uid: int(rapid.Uint32().Draw(t, "uid")), inode: rapid.Uint64().Draw(t, "inode"),
		}
		if got, err := parseRow(line(want)); err != nil || got != want {
			t.Errorf("got %+v, %v", got, err)
		}
	})
}

func TestBetween(t *testing.T) {
	client, server := netip.MustParseAddrPort("127.0.0.1:40058"), netip.MustParseAddrPort("127.0.0.1:8080")
	other := netip.MustParseAddrPort("127.0.0.2:8080")
	mine := row{client, server, 1000, 42}
	mapped := strings.Replace(line(mine), hexAddr(client), hexAddr(netip.AddrPortFrom(netip.AddrFrom16(client.Addr().As16()), client.Port())), 1)
	for name, c := range map[string]struct {
		table string
		want  int // rows; -1: an error
	}{
		"there":              {header + line(row{server, client, 0, 41}) + line(mine) + line(row{client, other, 0, 43}), 1},
		"mapped into IPv6":   {header + mapped, 1},
		"another's":          {header + line(row{client, other, 1000, 42}), 0},
		"only the other end": {header + line(row{server, client, 1000, 42}), 0},
		"nobody's any more":  {header + line(row{client, server, 1000, 0}), 0},
		"none":               {header, 0},
		"empty":              {"", -1},
		"cut":                {header + line(mine)[:40], -1},
		"not a table":        {header + strings.Repeat("x ", 20) + "\n", -1},
		"a long line":        {header + strings.Repeat("x", 1<<20), -1},
		"address too long":   {header + strings.Replace(line(mine), "0100007F:", "000100007F:", 1), -1},
		"user too large":     {header + strings.Replace(line(mine), " 1000 ", " 4294967296 ", 1), -1},
	} {
		got, err := between(strings.NewReader(c.table), client, server)
		if (err != nil) != (c.want < 0) || c.want >= 0 && len(got) != c.want {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
		for _, r := range got {
			if r != mine {
				t.Errorf("%s: got %+v", name, r)
			}
		}
	}
}

// TestKernelsTables reads what this machine has.
func TestKernelsTables(t *testing.T) {
	for _, path := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		table, err := os.ReadFile(path)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := between(strings.NewReader(string(table)), netip.AddrPort{}, netip.AddrPort{}); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func FuzzBetween(f *testing.F) {
	client, server := netip.MustParseAddrPort("127.0.0.1:40058"), netip.MustParseAddrPort("[2001:db8::1]:8080")
	f.Add(header + line(row{client, server, 1000, 42}))
	f.Add(header + line(row{server, client, 0, 0}))
	f.Add("")
	f.Fuzz(func(t *testing.T, table string) {
		rows, err := between(strings.NewReader(table), client, server)
		if err != nil {
			return
		}
		for _, r := range rows {
			if r.local != client || r.remote != server || r.inode == 0 {
				t.Errorf("got %+v", r)
			}
			if again, err := parseRow(line(r)); err != nil || again != r {
				t.Errorf("%+v is read as %+v, %v", r, again, err)
			}
		}
	})
}
