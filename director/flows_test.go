package director

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/ipvs"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/internal/sysctl"
)

// rack is a client and three real servers beside this namespace, on one link, with TCP and UDP of two VIPs. A real
// server answers every line and datagram with its number.
type rack struct {
	t    *testing.T
	d    *Director
	k    kernel
	port uint16 // the last that the client used
}

// racks were made so far. Each has client ports of its own: IPVS remembers the flows of the one before.
var racks atomic.Uint32

var rackVIPs = []string{"192.0.2.1", "2001:db8:2::1"}

func newRack(t *testing.T) *rack {
	nettest.Need(t, nettest.IPVS)
	flush(t)
	nettest.Shell(t, `
		ip link add br1 type bridge
		ip addr add 10.6.0.1/24 dev br1
		ip addr add 2001:db8:6::1/64 dev br1 nodad
		ip link set br1 up
		ip addr add 192.0.2.1/32 dev lo
		ip addr add 2001:db8:2::1/128 dev lo
		sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.ip_forward=1 net.ipv4.conf.all.arp_ignore=1
		for n in 1 2 3 9; do
			ip netns add rack$n
			ip link add rack$n type veth peer name eth0 netns rack$n
			ip link set rack$n master br1 up
			ip netns exec rack$n sysctl -qw net.ipv4.conf.all.arp_ignore=1
			ip -n rack$n addr add 10.6.0.1$n/24 dev eth0
			ip -n rack$n addr add 2001:db8:6::1$n/64 dev eth0 nodad
			ip -n rack$n link set eth0 up
			ip -n rack$n link set lo up
			[ $n = 9 ] || { ip -n rack$n addr add 192.0.2.1/32 dev lo; ip -n rack$n addr add 2001:db8:2::1/128 dev lo nodad; }
		done
		ip -n rack9 route add 192.0.2.1 via 10.6.0.1
		ip -n rack9 route add 2001:db8:2::1 via 2001:db8:6::1`)
	t.Cleanup(func() {
		nettest.Shell(t, "for n in 1 2 3 9; do ip link del rack$n; ip netns del rack$n; done; ip link del br1; ip addr del 192.0.2.1/32 dev lo; ip addr del 2001:db8:2::1/128 dev lo")
	})
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	for n := range 3 {
		name := fmt.Sprint(n + 1)
		inside(t, "rack"+name, func() error {
			l, err := net.Listen("tcp", ":80")
			if err != nil {
				return err
			}
			t.Cleanup(func() { _ = l.Close() })
			wg.Go(func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					wg.Go(func() {
						defer func() { _ = conn.Close() }()
						for r := bufio.NewReader(conn); ; {
							if _, err := r.ReadString('\n'); err != nil {
								return
							}
							_, _ = conn.Write([]byte(name))
						}
					})
				}
			})
			for _, vip := range rackVIPs {
				conn, err := net.ListenPacket("udp", netip.AddrPortFrom(netip.MustParseAddr(vip), 80).String())
				if err != nil {
					return err
				}
				t.Cleanup(func() { _ = conn.Close() })
				wg.Go(func() {
					b := make([]byte, 10)
					for {
						_, from, err := conn.ReadFrom(b)
						if err != nil {
							return
						}
						_, _ = conn.WriteTo([]byte(name), from)
					}
				})
			}
			return nil
		})
	}
	return &rack{t: t, k: opened(t, open), port: 10000 + uint16(racks.Add(1)-1)*3000%50000}
}

// real is a real server of the family of a VIP.
func (r *rack) real(vip, n string, weight int) ravel.RealServer {
	if strings.Contains(vip, ":") {
		return rs("2001:db8:6::1"+n, weight)
	}
	return rs("10.6.0.1"+n, weight)
}

// services are all four with real servers such as "3 2/0 1": newest first, the second drained from weight 2.
func (r *rack) services(list string) []ravel.VirtualService {
	var services []ravel.VirtualService
	for _, vip := range rackVIPs {
		for _, proto := range []string{"tcp", "udp"} {
			services = append(services, r.service(proto, vip, list))
		}
	}
	return services
}

func (r *rack) service(proto, vip, list string) ravel.VirtualService {
	v := vs(proto + " " + netip.AddrPortFrom(netip.MustParseAddr(vip), 80).String())
	for _, name := range strings.Fields(list) {
		server := r.real(vip, name[:1], 2)
		if len(name) > 1 {
			server.Weight = 0
		}
		v.RealServers = append(v.RealServers, server)
	}
	return v
}

// flow is one flow of the client.
type flow struct {
	net.Conn
	from netip.AddrPort
	real string // who answered first
}

// open opens a flow from a port that was not used before.
func (r *rack) open(proto, vip string) *flow {
	r.t.Helper()
	f := &flow{}
	r.port++
	self := "10.6.0.19"
	if strings.Contains(vip, ":") {
		self = "2001:db8:6::19"
	}
	f.from = netip.AddrPortFrom(netip.MustParseAddr(self), r.port)
	inside(r.t, "rack9", func() (err error) {
		dialer := net.Dialer{Timeout: 10 * time.Second, LocalAddr: net.UDPAddrFromAddrPort(f.from)}
		if proto == "tcp" {
			dialer.LocalAddr = net.TCPAddrFromAddrPort(f.from)
		}
		f.Conn, err = dialer.DialContext(r.t.Context(), proto, netip.AddrPortFrom(netip.MustParseAddr(vip), 80).String())
		return err
	})
	r.t.Cleanup(func() { _ = f.Close() })
	var err error
	if f.real, err = f.ask(); err != nil {
		r.t.Fatalf("a new flow to %s %s: %v", proto, vip, err)
	}
	return f
}

// ask returns who answers. A datagram may be lost.
func (f *flow) ask() (string, error) {
	b := make([]byte, 10)
	tries, patience := 1, 10*time.Second
	if f.RemoteAddr().Network() == "udp" {
		tries, patience = 25, 200*time.Millisecond
	}
	var err error
	for range tries {
		_ = f.SetDeadline(time.Now().Add(patience))
		if _, err = f.Write([]byte("who\n")); err != nil {
			return "", err
		}
		var n int
		if n, err = f.Read(b); err == nil {
			return string(b[:n]), nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
	}
	return "", err
}

// entries counts the flows of a protocol that IPVS knows.
func (r *rack) entries(proto string) int {
	r.t.Helper()
	b, err := os.ReadFile("/proc/thread-self/net/ip_vs_conn") // the first thread may be elsewhere
	if err != nil {
		r.t.Fatal(err)
	}
	return strings.Count(string(b), "\n"+strings.ToUpper(proto)+" ")
}

func (r *rack) start(o Options) {
	o.Sysctl = sysctl.New("/proc/sys", "")
	r.d = start(r.t, o)
}

// TestFlowsOfThoseAddedAgainGoOn mends the order again and again under open flows. New ones go where the table says
// that internal/maglev computes from the wanted list alone, whatever the kernel's history.
func TestFlowsOfThoseAddedAgainGoOn(t *testing.T) {
	r := newRack(t)
	r.start(Options{})
	random := rand.New(rand.NewPCG(seed(t), 2))
	apply(t, r.d, r.services("3 2 1")...)
	var flows []*flow
	for _, vip := range rackVIPs {
		for range 8 {
			flows = append(flows, r.open("tcp", vip), r.open("udp", vip))
		}
	}
	moved := 0
	for step := range 9 {
		names := []string{"1", "2", "3"}
		random.Shuffle(3, func(i, j int) { names[i], names[j] = names[j], names[i] })
		if n := random.IntN(6); n < 3 {
			names[n] += "/"
		}
		if step%4 == 3 { // a new process
			if err := r.d.Close(); err != nil {
				t.Fatal(err)
			}
			r.start(Options{})
		}
		want := r.services(strings.Join(names, " "))
		before := dump(t, r.k)
		apply(t, r.d, want...)
		if after := dump(t, r.k); after != before {
			moved++
		}
		if diff := cmp.Diff(shown(want), dump(t, r.k)); diff != "" {
			t.Fatalf("table (-want +got):\n%s", diff)
		}
		for _, f := range flows {
			if who, err := f.ask(); who != f.real || err != nil {
				t.Fatalf("step %d, %v: flow from %s to %s began at %s: now %q, %v", step, names, f.from, f.RemoteAddr(), f.real, who, err)
			}
		}
		for _, v := range want {
			table := maglev.Build(maglev.DefaultSize, v)
			for range 8 {
				f := r.open(v.Key.Proto.String(), v.Key.VIP.String())
				at, ok := table.Pick(f.from)
				if !ok || names[at][:1] != f.real {
					t.Fatalf("step %d, %v: a flow from %s to %s went to %s; the table says %d, %t", step, names, f.from, v.Key, f.real, at, ok)
				}
				_ = f.Close()
			}
		}
	}
	if moved < 4 {
		t.Errorf("%d of 9 changed the kernel's table: the test shows little", moved)
	}
}

// sender sends for ever, and knows who answered last.
type sender struct {
	*flow
	last  atomic.Pointer[string]
	moved atomic.Pointer[time.Time] // when another one answered first
}

// senders starts n that send every 20 ms.
func (r *rack) senders(vip string, n int) []*sender {
	var wg sync.WaitGroup
	stop := make(chan struct{})
	r.t.Cleanup(wg.Wait)
	r.t.Cleanup(func() { close(stop) })
	var list []*sender
	for range n {
		s := &sender{flow: r.open("udp", vip)}
		s.last.Store(&s.real)
		_ = s.SetDeadline(time.Time{})
		wg.Go(func() {
			for {
				_, _ = s.Write([]byte("who\n"))
				select {
				case <-stop:
					return
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
		wg.Go(func() {
			b := make([]byte, 10)
			for {
				_ = s.SetReadDeadline(time.Now().Add(time.Second))
				n, err := s.Read(b)
				select {
				case <-stop:
					return
				default:
				}
				if err == nil {
					who, now := string(b[:n]), time.Now()
					s.last.Store(&who)
					if who != s.real {
						s.moved.CompareAndSwap(nil, &now)
					}
				}
			}
		})
		list = append(list, s)
	}
	return list
}

// TestRemovedFromUDP has sockets send for ever to a real server that is removed: they get answers from another one soon,
// though the kernel keeps flows of removed real servers for 300 s after the last datagram. TCP flows to real servers that are added
// again, in the same Apply and right after, are not touched.
func TestRemovedFromUDP(t *testing.T) {
	r := newRack(t)
	r.start(Options{open: func() (kernel, error) {
		k, err := open()
		return dallying{k}, err
	}})
	apply(t, r.d, r.services("3 2 1")...)
	var flows []*flow
	for _, vip := range rackVIPs {
		for range 12 {
			flows = append(flows, r.open("tcp", vip))
		}
	}
	for _, vip := range rackVIPs {
		senders := r.senders(vip, 12)
		at := map[string]int{}
		for _, s := range senders {
			at[s.real]++
		}
		if at["1"] == 0 || at["2"] == 0 || at["3"] == 0 {
			t.Fatalf("12 flows go to %v: the test shows nothing", at)
		}
		key := "udp " + netip.AddrPortFrom(netip.MustParseAddr(vip), 80).String()
		with := func(tcp, udp string) []ravel.VirtualService {
			list := r.services(tcp)
			for i, v := range list {
				if v.Key.String() == key {
					list[i] = r.service("udp", vip, udp)
				}
			}
			return list
		}
		known := r.entries("tcp")
		began := time.Now()
		apply(t, r.d, with("1 3 2", "3 2")...)
		apply(t, r.d, with("2 1 3", "3 2")...)
		var last time.Duration
		for _, s := range senders {
			if s.real != "1" {
				continue
			}
			for s.moved.Load() == nil {
				if time.Since(began) > 20*time.Second {
					t.Fatalf("%s to %s goes to the removed real server still\n%s", s.from, vip, nettest.Shell(t, "cat /proc/net/ip_vs_conn /proc/net/ip_vs"))
				}
				time.Sleep(time.Millisecond)
			}
			last = max(last, s.moved.Load().Sub(began))
		}
		t.Logf("%d flows of %s moved within %v", at["1"], vip, last.Round(time.Millisecond))
		apply(t, r.d, with("3 2 1", "2 3")...)
		if took := time.Since(began); took < expiring {
			t.Errorf("real servers were added again after %v, while the kernel may be expiring flows", took)
		}
		if now := r.entries("tcp"); now != known {
			t.Errorf("%d of %d TCP flows were forgotten", known-now, known)
		}
		for _, f := range flows {
			if who, err := f.ask(); who != f.real || err != nil {
				t.Errorf("flow from %s to %s began at %s: now %q, %v", f.from, f.RemoteAddr(), f.real, who, err)
			}
		}
		for _, s := range senders {
			if now := *s.last.Load(); s.real != "1" && now != s.real {
				t.Errorf("%s to %s went from %s to %s, which it had no reason to", s.from, vip, s.real, now)
			}
		}
		if v, err := r.d.sysctl.Get(nodest); v != "0" || err != nil {
			t.Errorf("%s is %s, %v; want it back at 0", nodest, v, err)
		}
	}
}

// dallying is a kernel in which a moment takes longer: TCP's real servers are gone for a while when they are removed, and
// what is raised stays so.
type dallying struct{ kernel }

const dally = 20 * time.Millisecond

func (k dallying) DelDestination(s *ipvs.Service, d *ipvs.Destination) error {
	if ravel.Proto(s.Protocol) == ravel.TCP {
		defer time.Sleep(dally)
	}
	return k.kernel.DelDestination(s, d)
}

func (k dallying) UpdateDestination(s *ipvs.Service, d *ipvs.Destination) error {
	if d.Weight > 0 {
		defer time.Sleep(dally)
	}
	return k.kernel.UpdateDestination(s, d)
}

// TestNewFlowsAreHeldBack sends new flows without end while last weights are given: none reaches a real server that is
// to have weight 0, unless nothing holds them back.
func TestNewFlowsAreHeldBack(t *testing.T) {
	r := newRack(t)
	const vip = "192.0.2.1"
	hold := func(ravel.ServiceKey) (func(), error) {
		nettest.Shell(t, "iptables -I INPUT -d 192.0.2.1 -j DROP")
		return func() { nettest.Shell(t, "iptables -D INPUT -d 192.0.2.1 -j DROP") }, nil
	}
	want := r.service("udp", vip, "3/ 2 1/")
	r.start(Options{})
	apply(t, r.d, want)
	var astray, sent atomic.Int64
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		inside(t, "rack9", func() error {
			b := make([]byte, 10)
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				conn, err := net.Dial("udp", vip+":80")
				if err != nil {
					return err
				}
				_, _ = conn.Write([]byte("x"))
				_ = conn.SetReadDeadline(time.Now().Add(2 * time.Millisecond))
				if n, err := conn.Read(b); err == nil && string(b[:n]) != "2" {
					astray.Add(1)
				}
				sent.Add(1)
				_ = conn.Close()
			}
		})
	})
	defer wg.Wait()
	defer close(stop)
	for _, held := range []bool{true, false} {
		o := Options{open: func() (kernel, error) {
			k, err := open()
			return dallying{k}, err
		}}
		if held {
			o.HoldBack = hold
		}
		// Without it, three times are nearly always enough to see what it is for.
		for try := 0; try < 3 || !held && astray.Load() == 0 && try < 50; try++ {
			if err := r.d.Close(); err != nil {
				t.Fatal(err)
			}
			r.start(o)
			before := sent.Load()
			apply(t, r.d, want)
			eventually(t, "flows after it", func() bool { return sent.Load() > before+10 })
		}
		if n := astray.Load(); held != (n == 0) {
			t.Errorf("held back %t: %d of %d new flows went to a drained real server", held, n, sent.Load())
		}
	}
	list, err := r.d.Read(t.Context())
	if err != nil || len(list) != 1 || !slices.Equal(list[0].RealServers, want.RealServers) {
		t.Errorf("%+v, %v; want %+v", list, err, want)
	}
}
