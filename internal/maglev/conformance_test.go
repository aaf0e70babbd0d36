package maglev

import (
	"bufio"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// flow is what the kernel's connection table knows a flow by.
type flow struct {
	client  netip.AddrPort
	service ravel.ServiceKey
}

// The kernel gives every one of 23,000 flows to the real server that Build says, through random lives of services: real
// servers that come, go, come again, drain, change weights; schedulers that are bound anew; services that are made anew.
// RAVEL_TEST_ROUNDS has it do so more than once, and RAVEL_TEST_SEED repeats what it did.
func TestKernelPicks(t *testing.T) {
	nettest.Need(t, nettest.IPVS, nettest.Dummy)
	const steps, flows = 24, 60
	rounds := 1
	if n, err := strconv.Atoi(os.Getenv("RAVEL_TEST_ROUNDS")); err == nil {
		rounds = n
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("RAVEL_TEST_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("RAVEL_TEST_SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	for range rounds {
		nettest.InNetns(t, func() {
			k := newKernel(t)
			defer k.close()
			want := map[flow]netip.Addr{} // the invalid address for a flow that nobody takes
			for n := range 16 {
				s := k.newLife(t, random, n)
				for range steps {
					s.step(random)
					table := Build(DefaultSize, s.v)
					for range flows {
						f := flow{s.client(random), s.v.Key}
						if _, twice := want[f]; twice {
							continue
						}
						want[f] = netip.Addr{}
						if i, ok := table.Pick(f.client); ok {
							want[f] = s.v.RealServers[i].Addr
						}
						k.send(f)
					}
				}
			}
			k.compare(want)
		})
	}
}

// kernelUnderTest is the IPVS of a network namespace from which no packet leaves.
type kernelUnderTest struct {
	t      *testing.T
	ipvs   *ipvs.Handle
	v4, v6 int // raw sockets, which send from any address
}

func newKernel(t *testing.T) *kernelUnderTest {
	nettest.Shell(t, `
ip link set lo up
ip link add sink type dummy
ip link set sink up
ip route add 10.8.0.0/16 dev sink
ip route add 192.0.2.0/24 dev sink
ip -6 addr add 2001:db8:9::1/128 dev sink nodad
ip -6 route add 2001:db8:8::/48 dev sink
ip -6 route add 2001:db8:1::/48 dev sink`)
	k := &kernelUnderTest{t: t}
	var err error
	if k.ipvs, err = ipvs.New(""); err != nil {
		t.Fatal(err)
	}
	if k.v4, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
		t.Fatal(err)
	}
	if k.v6, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *kernelUnderTest) close() {
	k.ipvs.Close()
	_ = unix.Close(k.v4)
	_ = unix.Close(k.v6)
}

func (k *kernelUnderTest) must(what string, err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatalf("%s: %v", what, err)
	}
}

// send sends the first packet of a flow: IPVS looks at packets of this host's too, before they leave it. There are no
// checksums, which IPVS reads only where it changes addresses.
func (k *kernelUnderTest) send(f flow) {
	k.t.Helper()
	l4 := make([]byte, 0, 20)
	l4 = binary.BigEndian.AppendUint16(l4, f.client.Port())
	l4 = binary.BigEndian.AppendUint16(l4, f.service.Port)
	if f.service.Proto == ravel.TCP {
		l4 = append(l4, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, 0x02 /* SYN */, 255, 255, 0, 0, 0, 0)
	} else {
		l4 = append(l4, 0, 8, 0, 0)
	}
	if f.service.VIP.Is4() {
		p := make([]byte, 20, 60)
		p[0], p[8], p[9] = 4<<4|5, 64, byte(f.service.Proto)
		binary.BigEndian.PutUint16(p[2:], uint16(20+len(l4)))
		src, dst := f.client.Addr().As4(), f.service.VIP.As4()
		copy(p[12:], src[:])
		copy(p[16:], dst[:])
		k.drop(unix.Sendto(k.v4, append(p, l4...), 0, &unix.SockaddrInet4{Addr: dst}))
		return
	}
	p := make([]byte, 40, 60)
	p[0], p[6], p[7] = 6<<4, byte(f.service.Proto), 64
	binary.BigEndian.PutUint16(p[4:], uint16(len(l4)))
	src, dst := f.client.Addr().As16(), f.service.VIP.As16()
	copy(p[8:], src[:])
	copy(p[24:], dst[:])
	k.drop(unix.Sendto(k.v6, append(p, l4...), 0, &unix.SockaddrInet6{Addr: dst}))
}

// drop takes the answer to a packet. One that IPVS dropped, because nobody takes it, is EPERM.
func (k *kernelUnderTest) drop(err error) {
	k.t.Helper()
	if err != nil && err != unix.EPERM {
		k.t.Fatalf("sending: %v", err)
	}
}

// compare reads the kernel's connection table: each flow is in it with the real server that is wanted, and no other is.
func (k *kernelUnderTest) compare(want map[flow]netip.Addr) {
	k.t.Helper()
	file, err := os.Open("/proc/thread-self/net/ip_vs_conn")
	k.must("reading the connections", err)
	defer file.Close()
	got := make(map[flow]netip.Addr, len(want))
	lines := bufio.NewScanner(file)
	lines.Scan() // the heading
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		var c flow
		k.must("protocol", c.service.Proto.UnmarshalText([]byte(f[0])))
		c.client = k.addrPort(f[1], f[2])
		at := k.addrPort(f[3], f[4])
		c.service.VIP, c.service.Port = at.Addr(), at.Port()
		got[c] = k.addrPort(f[5], f[6]).Addr()
	}
	k.must("reading the connections", lines.Err())
	wrong, nobody := 0, 0
	for f, addr := range want {
		if !addr.IsValid() {
			nobody++
		}
		if got[f] != addr {
			if wrong++; wrong <= 5 {
				k.t.Errorf("%s to %s: the kernel picks %s, want %s", f.client, f.service, got[f], addr)
			}
		}
	}
	k.t.Logf("%d flows, %d of them taken by nobody, %d as they should not", len(want), nobody, wrong)
	if wrong > 5 {
		k.t.Errorf("and %d more flows", wrong-5)
	}
	if len(got) != len(want)-nobody {
		k.t.Errorf("the kernel has %d connections, want %d", len(got), len(want)-nobody)
	}
}

// addrPort reads an address as ip_vs_conn_seq_show writes it.
func (k *kernelUnderTest) addrPort(addr, port string) netip.AddrPort {
	k.t.Helper()
	p, err := strconv.ParseUint(port, 16, 16)
	k.must("port", err)
	if !strings.Contains(addr, ":") {
		n, err := strconv.ParseUint(addr, 16, 32)
		k.must("address", err)
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, uint32(n)))), uint16(p))
	}
	a, err := netip.ParseAddr(strings.Trim(addr, "[]"))
	k.must("address", err)
	return netip.AddrPortFrom(a, uint16(p))
}

// life is a service, and what the kernel should have made of what was done to it.
type life struct {
	k    *kernelUnderTest
	v    ravel.VirtualService
	most int // real servers
	size int // of its weights
	past []netip.Addr
}

// newLife makes the nth service: the first four bits of n choose the family, protocol and flags.
func (k *kernelUnderTest) newLife(t *testing.T, random *rand.Rand, n int) *life {
	s := &life{k: k, most: []int{4, 12, 40, 120}[random.IntN(4)], size: []int{1, 3, 63, 200, 65535}[random.IntN(5)]}
	s.v.Scheduler = ravel.MH
	s.v.Key = ravel.ServiceKey{VIP: netip.MustParseAddr("192.0.2.1"), Proto: ravel.TCP, Port: uint16(1 + random.IntN(65535))}
	if n&1 != 0 {
		s.v.Key.VIP = netip.MustParseAddr("2001:db8:1::1")
	}
	if n&2 != 0 {
		s.v.Key.Proto = ravel.UDP
	}
	if n&4 != 0 {
		s.v.Flags |= ravel.HashPort
	}
	if n&8 != 0 {
		s.v.Flags |= ravel.Fallback
	}
	for range n % 4 { // no two services alike
		s.v.Key.VIP = s.v.Key.VIP.Next()
	}
	k.must("adding a service", k.ipvs.NewService(s.service(string(ravel.MH))))
	for range 1 + random.IntN(s.most) {
		s.add(random)
	}
	t.Logf("%s flags %#x: up to %d real servers of weights to %d", s.v.Key, s.v.Flags, s.most, s.size)
	return s
}

func (s *life) service(scheduler string) *ipvs.Service {
	r := &ipvs.Service{
		Address: s.v.Key.VIP.AsSlice(), Protocol: uint16(s.v.Key.Proto), Port: s.v.Key.Port,
		AddressFamily: unix.AF_INET, Netmask: 0xffffffff, SchedName: scheduler, Flags: uint32(s.v.Flags),
	}
	if s.v.Key.VIP.Is6() {
		r.AddressFamily, r.Netmask = unix.AF_INET6, 128
	}
	return r
}

func (s *life) destination(addr netip.Addr, weight int) *ipvs.Destination {
	return &ipvs.Destination{
		Address: addr.AsSlice(), Port: s.v.Key.Port, Weight: weight, AddressFamily: s.service("").AddressFamily,
		ConnectionFlags: ipvs.ConnectionFlagDirectRoute,
	}
}

// step changes the service in one to four ways.
func (s *life) step(random *rand.Rand) {
	for range 1 + random.IntN(4) {
		n := len(s.v.RealServers)
		s.v.RealServers = slices.Clone(s.v.RealServers)
		switch way := random.IntN(20); {
		case n == 0 || way < 6 && n < s.most:
			s.add(random)
		case way < 9:
			i := random.IntN(n)
			s.k.must("removing", s.k.ipvs.DelDestination(s.service(""), s.destination(s.v.RealServers[i].Addr, 0)))
			s.past = append(s.past, s.v.RealServers[i].Addr)
			s.v.RealServers = slices.Delete(s.v.RealServers, i, i+1)
		case way < 13:
			s.weigh(random.IntN(n), 0)
		case way < 18:
			s.weigh(random.IntN(n), s.weight(random))
		case way < 19:
			// The scheduler goes and comes back.
			s.k.must("unbinding", s.k.ipvs.UpdateService(s.service("none")))
			s.k.must("binding", s.k.ipvs.UpdateService(s.service(string(ravel.MH))))
		default:
			s.again(random.IntN(2) == 0)
		}
	}
}

func (s *life) weight(random *rand.Rand) int { return random.IntN(s.size + 1) }

// add adds a real server, one that was there before if any, as often as not.
func (s *life) add(random *rand.Rand) {
	var addr netip.Addr
	for !addr.IsValid() || slices.ContainsFunc(s.v.RealServers, func(rs ravel.RealServer) bool { return rs.Addr == addr }) {
		if n := len(s.past); n > 0 && random.IntN(2) == 0 {
			addr = s.past[random.IntN(n)]
			continue
		}
		addr = netip.AddrFrom4([4]byte{10, 8, byte(random.Uint32()), byte(random.Uint32())})
		if s.v.Key.VIP.Is6() {
			b := netip.MustParseAddr("2001:db8:8::").As16()
			binary.BigEndian.PutUint64(b[8:], random.Uint64())
			addr = netip.AddrFrom16(b)
		}
	}
	weight := s.weight(random)
	s.k.must("adding", s.k.ipvs.NewDestination(s.service(""), s.destination(addr, weight)))
	s.v.RealServers = slices.Insert(s.v.RealServers, 0, ravel.RealServer{Addr: addr, Weight: weight, LastWeight: weight})
}

func (s *life) weigh(i, weight int) {
	rs := &s.v.RealServers[i]
	s.k.must("weighing", s.k.ipvs.UpdateDestination(s.service(""), s.destination(rs.Addr, weight)))
	rs.Weight = weight
	if weight > 0 {
		rs.LastWeight = weight
	}
}

// again makes the service anew with the same list, as a director does after a restart of its host.
func (s *life) again(unbound bool) {
	s.k.must("deleting", s.k.ipvs.DelService(s.service("")))
	scheduler := string(ravel.MH)
	if unbound {
		scheduler = "none"
	}
	s.k.must("adding a service", s.k.ipvs.NewService(s.service(scheduler)))
	for _, rs := range slices.Backward(s.v.RealServers) {
		s.k.must("adding", s.k.ipvs.NewDestination(s.service(""), s.destination(rs.Addr, rs.LastWeight)))
		if rs.Weight != rs.LastWeight {
			s.k.must("weighing", s.k.ipvs.UpdateDestination(s.service(""), s.destination(rs.Addr, rs.Weight)))
		}
	}
	if unbound {
		s.k.must("binding", s.k.ipvs.UpdateService(s.service(string(ravel.MH))))
	}
}

// client makes up a client. A few of them share an address, and a few come from the port of FTP's data.
func (s *life) client(random *rand.Rand) netip.AddrPort {
	port := uint16(1 + random.IntN(65535))
	if random.IntN(50) == 0 {
		port = ftpData
	}
	if s.v.Key.VIP.Is4() {
		b := binary.BigEndian.AppendUint32(nil, random.Uint32())
		b[0] = 11 + b[0]%100 // unicast, and neither ours nor loopback
		if random.IntN(4) == 0 {
			b = []byte{198, 51, 100, b[3] % 4}
		}
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b)), port)
	}
	b := netip.MustParseAddr("2001:db8:2::").As16()
	if random.IntN(4) > 0 {
		b[0] = 0x20 + b[0]%16
		binary.BigEndian.PutUint32(b[1:], random.Uint32())
		binary.BigEndian.PutUint64(b[8:], random.Uint64())
	}
	return netip.AddrPortFrom(netip.AddrFrom16(b), port)
}
