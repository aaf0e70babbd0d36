package director

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// A host route is looked around, follows the routes of others, and hits none of theirs.
func TestKernelHostRoutes(t *testing.T) {
	links(t)
	nettest.Shell(t, `ip link add other0 type veth peer name other1; ip link set other0 up; ip link set other1 up
ip addr add 10.2.0.1/24 dev other0; ip route add default via 10.2.0.9; ip -6 addr add 2001:db8:33::1/64 dev other0 nodad
ip -6 route add default via 2001:db8:33::9
ip route add 10.1.1.0/24 dev reach0 mtu 1400; ip route add 10.1.2.0/24 nexthop dev reach0 nexthop dev other0
ip route add 10.9.0.66/32 dev reach0; ip addr add 10.9.0.3/24 dev reach0`)
	t.Cleanup(func() { nettest.Shell(t, "ip link del other0") })
	r, err := newReach(nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	near4, near6 := netip.MustParseAddr("10.9.0.5"), netip.MustParseAddr("2001:db8:9::5")
	for _, a := range []string{"10.8.1.1", "10.7.1.1", "10.4.0.1", "10.1.2.5", "2001:db8:8::5", "10.9.0.66", "10.9.0.1"} {
		if err := r.keepsWay(netip.MustParseAddr(a)); !errors.Is(err, errTaken) {
			t.Errorf("a host route to %s: %v, want that something stands in the way", a, err)
		}
	}
	shown := func() string {
		return strings.Join(strings.Fields(nettest.Shell(t, "ip route show proto 82; ip -6 route show proto 82 | sed 's/ pref medium//'")), " ")
	}
	until := func(what, want string) {
		t.Helper()
		eventually(t, fmt.Sprintf("%s: %q", what, want), func() bool { return shown() == want })
	}
	for _, a := range []netip.Addr{near4, near6} {
		for range 2 {
			if err := r.keepsWay(a); err != nil {
				t.Fatal(err)
			}
		}
	}
	both := "10.9.0.5 via 10.9.0.5 dev reach0 src 10.9.0.1 onlink 2001:db8:9::5 via 2001:db8:9::5 dev reach0 metric 1 onlink"
	until("added", both)
	small := netip.MustParseAddr("10.1.1.5")
	if err := r.keepsWay(small); err != nil || !strings.Contains(shown(), "10.1.1.5 via 10.1.1.5 dev reach0 onlink mtu 1400") {
		t.Errorf("%v; want the mtu too: %s", err, shown())
	}
	r.mu.Lock()
	if err := r.dropHost(small); err != nil {
		t.Error(err)
	}
	r.mu.Unlock()
	r.refresh(t.Context())
	for _, a := range []netip.Addr{near4, near6} {
		if is := r.ask(a); !is.onLink || is.err != nil {
			t.Errorf("%s with a host route: %+v", a, is)
		}
	}
	again, err := newReach(nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer again.close()
	wanted := []ravel.VirtualService{vs("tcp 192.0.2.1:80", rs(near4.String(), 1)), vs("tcp [2001:db8::1]:80", rs(near6.String(), 1))}
	if again.release(wanted); len(again.hosts) != 2 {
		t.Errorf("a new process finds %v", again.hosts)
	}
	nettest.Shell(t, "ip link set reach0 down")
	until("the link is down", "")
	eventually(t, "it is seen that only a gateway is left", func() bool { return !r.ask(near4).onLink && !r.ask(near6).onLink })
	nettest.Shell(t, "ip link set reach0 up; ip -6 addr add 2001:db8:9::1/64 dev reach0 nodad")
	until("it is up again", both)
	nettest.Shell(t, `ip addr flush dev reach0; ip addr add 10.9.0.1/24 dev other0
ip -6 addr add 2001:db8:9::1/64 dev other0 nodad`)
	until("the subnets move to another link", strings.ReplaceAll(both, "reach0", "other0"))
	nettest.Shell(t, `ip addr add 10.3.0.1/24 dev other0; ip route add 10.9.0.5/32 via 10.3.0.9 metric 5`)
	until("one is behind a gateway", "2001:db8:9::5 via 2001:db8:9::5 dev other0 metric 1 onlink")
	if again.ask(near4).onLink {
		t.Error("the one behind a gateway is on-link still")
	}
	for _, one := range []*reach{r, again} {
		one.resync()
		one.release(wanted[:1])
	}
	until("the other is no real server any more", "")
	nettest.Shell(t, "ip route del 10.9.0.5/32")
	until("the first is on-link again", strings.ReplaceAll(both[:strings.Index(both, " 2001")], "reach0", "other0"))
}

// mixed is a director in this namespace, a client and a real server beside it on one link. The real server has the VIPs
// and takes packets directly and out of tunnels; it echoes datagrams.
func mixed(t *testing.T) {
	nettest.Need(t, nettest.IPVS, nettest.IPIP)
	nettest.Shell(t, `
		ip link add br0 type bridge
		ip addr add 10.9.0.1/24 dev br0
		ip addr add 2001:db8:9::1/64 dev br0 nodad
		ip link set br0 up
		ip addr add 192.0.2.1/32 dev lo
		ip addr add 2001:db8:2::1/128 dev lo
		sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.ip_forward=1 net.ipv4.conf.all.arp_ignore=1
		n=2
		for name in client real; do
			ip netns add $name
			ip link add $name type veth peer name eth0 netns $name
			ip link set $name master br0 up
			ip netns exec $name sysctl -qw net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.default.rp_filter=0 net.ipv4.conf.all.rp_filter=0
			ip -n $name addr add 10.9.0.$n/24 dev eth0
			ip -n $name addr add 2001:db8:9::$n/64 dev eth0 nodad
			ip -n $name link set eth0 up
			ip -n $name link set lo up
			n=3
		done
		ip -n client route add 192.0.2.1 via 10.9.0.1
		ip -n client route add 2001:db8:2::1 via 2001:db8:9::1
		ip -n real addr add 192.0.2.1/32 dev lo
		ip -n real addr add 2001:db8:2::1/128 dev lo nodad
		ip -n real link add tunl0 type ipip 2>/dev/null || true
		ip -n real link set tunl0 up
		ip netns exec real sysctl -qw net.ipv4.conf.tunl0.rp_filter=0
		ip -n real link set ip6tnl0 up`)
	t.Cleanup(func() {
		nettest.Shell(t, "ip netns del client; ip netns del real; ip link del br0; ip addr del 192.0.2.1/32 dev lo; ip addr del 2001:db8:2::1/128 dev lo")
	})
	var echo sync.WaitGroup
	t.Cleanup(echo.Wait)
	for _, at := range []string{"192.0.2.1:80", "[2001:db8:2::1]:80"} {
		var conn net.PacketConn
		inside(t, "real", func() (err error) {
			conn, err = net.ListenPacket("udp", at)
			return err
		})
		t.Cleanup(func() { _ = conn.Close() })
		echo.Go(func() {
			b := make([]byte, 100)
			for {
				n, from, err := conn.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = conn.WriteTo(b[:n], from)
			}
		})
	}
}

// inside runs something in a namespace.
func inside(t *testing.T, name string, do func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		f, err := os.Open("/run/netns/" + name)
		if err == nil {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
			_ = f.Close()
		}
		if err == nil {
			err = do()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// Flows that began under one forwarding go on under the other, beside new ones, whichever of them sends first.
func TestMixedForwarding(t *testing.T) {
	mixed(t)
	for _, c := range []struct{ vip, real string }{{"192.0.2.1", "10.9.0.3"}, {"2001:db8:2::1", "2001:db8:9::3"}} {
		t.Run(c.vip, func(t *testing.T) {
			d, err := New(Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if _, err := start(t, Options{}).Cleanup(t.Context(), false); err != nil {
					t.Error(err)
				}
			}()
			defer func() { _ = d.Close() }()
			to := netip.AddrPortFrom(netip.MustParseAddr(c.vip), 80)
			want := func(f ravel.Forwarding, weight int) ravel.VirtualService {
				r := rs(c.real, weight)
				r.Forwarding = f
				return vs("udp "+to.String(), r)
			}
			var flows []net.Conn
			open := func() net.Conn {
				var conn net.Conn
				inside(t, "client", func() (err error) {
					conn, err = net.Dial("udp", to.String())
					return err
				})
				t.Cleanup(func() { _ = conn.Close() })
				flows = append(flows, conn)
				return conn
			}
			answers := func(conn net.Conn, patience time.Duration) bool {
				b := make([]byte, 100)
				for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
					_ = conn.SetDeadline(time.Now().Add(200 * time.Millisecond))
					if _, err := conn.Write([]byte("x")); err != nil {
						continue // an answer that it cannot be reached
					}
					if _, err := conn.Read(b); err == nil {
						return true
					}
				}
				return false
			}
			apply(t, d, want(ravel.Tunnel, 1))
			for !answers(open(), 20*time.Second) {
				t.Fatal("no answer by tunnel")
			}
			ways := []ravel.Forwarding{ravel.Direct, ravel.Tunnel, ravel.Direct}
			for n, way := range ways {
				apply(t, d, want(way, 1))
				open()
				for round := range 2 * len(flows) {
					apply(t, d, want(way, 2+round)) // an edit has IPVS look for its route again
					for i := range flows {
						if at := (i + round) % len(flows); !answers(flows[at], 10*time.Second) {
							t.Fatalf("after change %d to %s, round %d: flow %d has no answer\n%s", n+1, way, round, at,
								nettest.Shell(t, "ip route show; ip -6 route show; ip neigh; cat /proc/net/ip_vs_conn"))
						}
					}
				}
			}
			// Without the host route, and with a tunnelled packet first, the kernel does what all this is about. If it
			// no longer does, this file may go. Not each try shows it: other changes of the network have IPVS look for
			// its route again too.
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			nettest.Shell(t, "ip route del "+c.real+" proto 82")
			lost := false
			for tries := 0; tries < 20 && !lost; tries++ {
				nettest.Shell(t, "ip neigh flush dev br0; ip route add blackhole 10.7.1.0/24; ip route del blackhole 10.7.1.0/24; "+
					"ip -6 route add blackhole 2001:db8:7::/48; ip -6 route del blackhole 2001:db8:7::/48")
				if !answers(flows[0], 10*time.Second) {
					t.Fatal("no answer by tunnel without a host route")
				}
				lost = !answers(flows[1], time.Second)
			}
			if !lost {
				t.Error("a direct flow lives on a tunnel's route: the kernel needs no host routes")
			}
		})
	}
}
