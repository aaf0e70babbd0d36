package e2e

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/lab/stage"
)

// traced is what a test reads of `ravel trace -o json`.
type traced struct {
	Flags       []string
	TableSize   int
	RealServers []struct {
		Address            netip.Addr
		Weight, LastWeight int
		State              string
	}
	Pick   netip.Addr
	Next   netip.Addr
	Pinned netip.Addr
	Agree  []string
}

// trace asks a director where a flow goes.
func trace(t *testing.T, s *stage.Stage, node string, client netip.AddrPort, key ravel.ServiceKey) (answer traced) {
	t.Helper()
	must(t, s.Tell(t.Context(), node, "trace", map[string]any{
		"client": client.Addr(), "clientPort": client.Port(), "vip": key.VIP, "protocol": key.Proto, "port": key.Port,
	}, &answer))
	return answer
}

// tableOf computes the Maglev table of a service by what a director's trace says of it.
func tableOf(t *testing.T, s *stage.Stage, node string, key ravel.ServiceKey) (*maglev.Table, []netip.Addr) {
	t.Helper()
	client := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), 1024)
	if key.VIP.Is6() {
		client = netip.AddrPortFrom(netip.MustParseAddr("2001:db8:1::1"), 1024)
	}
	answer := trace(t, s, node, client, key)
	v := ravel.VirtualService{Key: key, Scheduler: ravel.MH}
	if slices.Contains(answer.Flags, "mh-port") {
		v.Flags |= ravel.HashPort
	}
	if slices.Contains(answer.Flags, "mh-fallback") {
		v.Flags |= ravel.Fallback
	}
	var addrs []netip.Addr
	for _, r := range answer.RealServers {
		v.RealServers = append(v.RealServers, ravel.RealServer{Addr: r.Address, Weight: r.Weight, LastWeight: r.LastWeight})
		addrs = append(addrs, r.Address)
	}
	return maglev.Build(maglev.Size(answer.TableSize), v), addrs
}

// picked is a flow as the kernel's table of connections knows it.
type picked struct {
	client netip.AddrPort
	key    ravel.ServiceKey
}

// checkPicks sends the first packets of 20,000 flows through the kernel of each director: all must pick the same real
// servers, those that internal/maglev says.
func checkPicks(t *testing.T, s *stage.Stage, rng *rand.Rand) {
	t.Helper()
	const each = 5000
	var flows []picked
	for _, vip := range vips {
		for _, proto := range []ravel.Proto{ravel.TCP, ravel.UDP} {
			for range each {
				flows = append(flows, picked{someClient(rng, vip.Is6()), ravel.ServiceKey{VIP: vip, Proto: proto, Port: 80}})
			}
		}
	}
	for _, d := range s.Directors() {
		began := time.Now()
		want, nobody := map[picked]netip.Addr{}, 0
		tables := map[ravel.ServiceKey]*maglev.Table{}
		reals := map[ravel.ServiceKey][]netip.Addr{}
		for _, f := range flows {
			if tables[f.key] == nil {
				tables[f.key], reals[f.key] = tableOf(t, s, d, f.key)
			}
			if i, ok := tables[f.key].Pick(f.client); ok {
				want[f] = reals[f.key][i]
			} else {
				nobody++
			}
		}
		got := kernelPicks(t, s, d, flows)
		wrong := 0
		for f, addr := range want {
			if got[f] != addr {
				if wrong++; wrong <= 3 {
					t.Errorf("%s: %s to %s goes to %s, want %s", d, f.client, f.key, got[f], addr)
				}
			}
		}
		t.Logf("%s: %d flows, %d of them as they should not, %d for nobody, in %s", d, len(want), wrong, nobody, time.Since(began).Round(time.Millisecond))
		if wrong > 0 || nobody > 0 || len(want) < 4*each-50 {
			t.Errorf("%s: %d of %d flows go elsewhere, and %d nowhere", d, wrong, len(want), nobody)
		}
	}
}

// someClient makes up a client.
func someClient(rng *rand.Rand, v6 bool) netip.AddrPort {
	port := uint16(1024 + rng.IntN(60000))
	if !v6 {
		b := binary.BigEndian.AppendUint32(nil, rng.Uint32())
		b[0] = 11 + b[0]%100
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b)), port)
	}
	b := netip.MustParseAddr("2001:db8:2::").As16()
	binary.BigEndian.PutUint64(b[8:], rng.Uint64())
	return netip.AddrPortFrom(netip.AddrFrom16(b), port)
}

// kernelPicks sends the first packet of each flow from a director itself, whose IPVS takes it as if it had come from a router, and reads
// to whom it gave each. What would leave the director is dropped.
func kernelPicks(t *testing.T, s *stage.Stage, node string, flows []picked) map[picked]netip.Addr {
	t.Helper()
	const mark = 0x50490000
	rules := func(way string) {
		t.Helper()
		shell(t, s, node, fmt.Sprintf(`set -e; for c in iptables ip6tables; do $c -w -t mangle %s POSTROUTING -m mark --mark %#x -j DROP; done`, way, mark))
	}
	rules("-I")
	defer rules("-D")
	var v4, v6 int
	must(t, s.Fleet.Node(node).Do(func() (err error) {
		if v4, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			return err
		}
		v6, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return errors.Join(err, unix.SetsockoptInt(v4, unix.SOL_SOCKET, unix.SO_MARK, mark), unix.SetsockoptInt(v6, unix.SOL_SOCKET, unix.SO_MARK, mark))
	}))
	defer func() { _ = unix.Close(v4); _ = unix.Close(v6) }()
	for _, f := range flows {
		var err error
		if p := firstPacket(f); f.key.VIP.Is4() {
			err = unix.Sendto(v4, p, 0, &unix.SockaddrInet4{Addr: f.key.VIP.As4()})
		} else {
			err = unix.Sendto(v6, p, 0, &unix.SockaddrInet6{Addr: f.key.VIP.As16()})
		}
		if err != nil && !errors.Is(err, unix.EPERM) { // EPERM: dropped on its way out
			t.Fatalf("%s: sending %s to %s: %v", node, f.client, f.key, err)
		}
	}
	// What expires while the list is read has others skipped.
	got := openFlows(t, s, node)
	for range 5 {
		if !slices.ContainsFunc(flows, func(f picked) bool { return !got[f].IsValid() }) {
			break
		}
		for f, addr := range openFlows(t, s, node) {
			got[f] = addr
		}
	}
	return got
}

// firstPacket is the first packet of a flow, without checksums, which IPVS does not read.
func firstPacket(f picked) []byte {
	l4 := binary.BigEndian.AppendUint16(nil, f.client.Port())
	l4 = binary.BigEndian.AppendUint16(l4, f.key.Port)
	if f.key.Proto == ravel.TCP {
		l4 = append(l4, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, 0x02 /* SYN */, 255, 255, 0, 0, 0, 0)
	} else {
		l4 = append(l4, 0, 8, 0, 0)
	}
	if f.key.VIP.Is4() {
		p := make([]byte, 20, 60)
		p[0], p[8], p[9] = 4<<4|5, 64, byte(f.key.Proto)
		binary.BigEndian.PutUint16(p[2:], uint16(20+len(l4)))
		copy(p[12:], f.client.Addr().AsSlice())
		copy(p[16:], f.key.VIP.AsSlice())
		return append(p, l4...)
	}
	p := make([]byte, 40, 60)
	p[0], p[6], p[7] = 6<<4, byte(f.key.Proto), 64
	binary.BigEndian.PutUint16(p[4:], uint16(len(l4)))
	copy(p[8:], f.client.Addr().AsSlice())
	copy(p[24:], f.key.VIP.AsSlice())
	return append(p, l4...)
}

// openFlows reads to whom the kernel of a director sends each of its flows.
func openFlows(t *testing.T, s *stage.Stage, node string) map[picked]netip.Addr {
	t.Helper()
	file, err := os.Open(fmt.Sprintf("/proc/%d/net/ip_vs_conn", s.Fleet.Node(node).PID()))
	must(t, err)
	defer func() { _ = file.Close() }()
	at := func(addr, port string) netip.AddrPort {
		a, ok := procAddr(addr)
		p, err := strconv.ParseUint(port, 16, 16)
		if !ok || err != nil {
			t.Fatalf("%s: %q %q is no address and port", node, addr, port)
		}
		return netip.AddrPortFrom(a, uint16(p))
	}
	got := map[picked]netip.Addr{}
	lines := bufio.NewScanner(bufio.NewReaderSize(file, 1<<20))
	lines.Scan() // the heading
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		var f picked
		must(t, f.key.Proto.UnmarshalText([]byte(words[0])))
		f.client = at(words[1], words[2])
		vip := at(words[3], words[4])
		f.key.VIP, f.key.Port = vip.Addr(), vip.Port()
		got[f] = at(words[5], words[6]).Addr()
	}
	must(t, lines.Err())
	return got
}
