package agree_test

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/internal/roster"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// Of 100 real servers with 62 and 63 pods each one gets its share of the flows: the kernel's table holds the sum of their
// weights, because they were scaled.
func TestManyRealServersOfManyPods(t *testing.T) {
	nettest.Need(t, nettest.IPVS, nettest.Dummy)
	nettest.Shell(t, `
		ip link set lo up; ip link add sink type dummy; ip link set sink up
		ip addr add 10.8.0.1/16 dev sink; ip route add 192.0.2.0/24 dev sink
		ip -6 addr add 2001:db8:8::1/64 dev sink nodad; ip -6 route add 2001:db8:1::/64 dev sink`)
	t.Cleanup(func() { nettest.Shell(t, `ip link del sink`) })
	in := desired.Inputs{Role: ravel.Director, Node: "d1", Agreed: &desired.Agreed{Rosters: map[ravel.ServiceKey]ravel.Roster{}}}
	for _, vip := range []string{"192.0.2.1", "2001:db8:1::1"} {
		in.Cluster.Services = append(in.Cluster.Services, desired.Service{
			Key:       ravel.ServiceKey{VIP: netip.MustParseAddr(vip), Proto: ravel.TCP, Port: 80},
			Namespace: "shop", Service: "web", Scheduler: ravel.MH, Flags: ravel.Fallback | ravel.HashPort, Where: vip,
		})
	}
	const nodes = 100
	for i := range nodes {
		n := desired.Node{Name: fmt.Sprintf("r%d", i), Ready: true, Addrs: []netip.Addr{
			netip.AddrFrom4([4]byte{10, 8, 1, byte(i + 1)}), netip.MustParseAddr(fmt.Sprintf("2001:db8:8::%x", 256+i)),
		}}
		in.Cluster.Nodes = append(in.Cluster.Nodes, n)
		for pod := range 62 + i%2 {
			for _, addr := range []netip.Addr{netip.AddrFrom4([4]byte{10, 9, byte(i), byte(pod)}), netip.MustParseAddr(fmt.Sprintf("2001:db8:9:%x::%x", i, pod+1))} {
				in.Cluster.Endpoints = append(in.Cluster.Endpoints, desired.Endpoint{
					Namespace: "shop", Service: "web", Proto: ravel.TCP, Addr: addr, Port: 8080, Node: n.Name, Ready: true,
				})
			}
		}
	}
	for key, wishes := range desired.Wishes(in) {
		in.Agreed.Rosters[key] = roster.Predict("d1", nil, wishes, false)
	}
	state, problems := desired.Compute(in)
	for _, p := range problems {
		t.Log(p)
	}
	d, err := director.New(director.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	if _, err := d.Apply(t.Context(), state.Services); err != nil {
		t.Fatal(err)
	}

	const flows = 20_000
	for _, s := range in.Cluster.Services {
		send(t, s.Key, flows)
	}
	got := picks(t)
	for _, s := range in.Cluster.Services {
		var shares []int
		sum := 0
		for _, n := range in.Cluster.Nodes {
			addr := n.Addrs[0]
			if s.Key.VIP.Is6() {
				addr = n.Addrs[1]
			}
			shares = append(shares, got[addr])
			sum += got[addr]
		}
		slices.Sort(shares)
		t.Logf("%s: %d flows; the shares of %d real servers: %v", s.Key, sum, nodes, shares)
		mean := float64(sum) / nodes
		// Chance, and two slots of the table.
		off := 5*math.Sqrt(mean) + 2*float64(sum)/4093
		if sum != flows || float64(shares[0]) < mean-off || float64(shares[nodes-1]) > mean+off {
			t.Errorf("%s: %d of %d flows, from %d to %d each, want %.0f ± %.0f", s.Key, sum, flows, shares[0], shares[nodes-1], mean, off)
		}
	}
}

// send sends the first packets of that many flows from here, of random clients: IPVS schedules those, too. There are no
// checksums, which it does not read.
func send(t *testing.T, key ravel.ServiceKey, flows int) {
	t.Helper()
	family := unix.AF_INET
	if key.VIP.Is6() {
		family = unix.AF_INET6
	}
	socket, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(socket) }()
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range flows {
		tcp := binary.BigEndian.AppendUint16(nil, uint16(1024+rng.IntN(60000)))
		tcp = binary.BigEndian.AppendUint16(tcp, key.Port)
		tcp = append(tcp, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, 0x02 /* SYN */, 255, 255, 0, 0, 0, 0)
		if key.VIP.Is4() {
			p := make([]byte, 20)
			p[0], p[3], p[8], p[9] = 4<<4|5, 40, 64, byte(key.Proto)
			copy(p[12:], []byte{20, byte(i >> 16), byte(i >> 8), byte(i)})
			copy(p[16:], key.VIP.AsSlice())
			err = unix.Sendto(socket, append(p, tcp...), 0, &unix.SockaddrInet4{Addr: key.VIP.As4()})
		} else {
			p := make([]byte, 40)
			p[0], p[5], p[6], p[7] = 6<<4, 20, byte(key.Proto), 64
			client := netip.MustParseAddr("2001:db8:2::").As16()
			binary.BigEndian.PutUint32(client[12:], uint32(i))
			copy(p[8:], client[:])
			copy(p[24:], key.VIP.AsSlice())
			err = unix.Sendto(socket, append(p, tcp...), 0, &unix.SockaddrInet6{Addr: key.VIP.As16()})
		}
		if err != nil {
			t.Fatalf("sending: %v", err)
		}
	}
}

// picks counts the kernel's connections by real server.
func picks(t *testing.T) map[netip.Addr]int {
	t.Helper()
	file, err := os.Open("/proc/thread-self/net/ip_vs_conn")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	got := map[netip.Addr]int{}
	lines := bufio.NewScanner(file)
	lines.Scan() // the heading
	for lines.Scan() {
		text := strings.Trim(strings.Fields(lines.Text())[5], "[]")
		addr, err := netip.ParseAddr(text)
		if b, isHex := hex.DecodeString(text); err != nil && isHex == nil && len(b) == 4 {
			addr = netip.AddrFrom4([4]byte(b))
		}
		got[addr]++
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return got
}
