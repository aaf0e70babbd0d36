package guard

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// servicePort is listened on by the real server, and by the director too, which nobody may notice.
const servicePort = 80

// directors makes a client and a real server beside this namespace, on one bridge, with an IPVS service by direct
// routing for TCP and UDP of both VIPs. The real server answers "hello" with the text "real".
func directors(t *testing.T) *ipvs.Handle {
	nettest.Shell(t, `
		ip link set lo up
		ip link add br0 type bridge
		ip addr add 198.51.100.1/24 dev br0
		ip addr add 2001:db8:1::1/64 dev br0 nodad
		ip link set br0 up
		ip addr add 192.0.2.1/32 dev lo
		ip addr add 2001:db8:2::1/128 dev lo
		sysctl -qw net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.send_redirects=0 net.ipv4.ip_forward=1
		n=2
		for name in client real; do
			ip netns add $name
			ip link add $name type veth peer name eth0 netns $name
			ip link set $name master br0 up
			ip -n $name addr add 198.51.100.$n/24 dev eth0
			ip -n $name addr add 2001:db8:1::$n/64 dev eth0 nodad
			ip -n $name link set eth0 up
			ip -n $name link set lo up
			n=3
		done
		ip -n client route add 192.0.2.1 via 198.51.100.1
		ip -n client route add 2001:db8:2::1 via 2001:db8:1::1
		ip netns exec real sysctl -qw net.ipv4.conf.all.arp_ignore=1
		ip -n real addr add 192.0.2.1/32 dev lo
		ip -n real addr add 2001:db8:2::1/128 dev lo nodad`)
	t.Cleanup(func() { nettest.Shell(t, "ip netns del client; ip netns del real") })

	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	serve := func(answer string) {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", servicePort))
		must(t, err)
		t.Cleanup(func() { _ = l.Close() })
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() {
					defer func() { _ = c.Close() }()
					_ = c.SetDeadline(time.Now().Add(30 * time.Second))
					b := make([]byte, 10)
					for {
						if _, err := c.Read(b); err != nil {
							return
						}
						_, _ = c.Write([]byte(answer))
					}
				})
			}
		})
		for _, vip := range vips {
			u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(vip, servicePort)))
			must(t, err)
			t.Cleanup(func() { _ = u.Close() })
			wg.Go(func() {
				b := make([]byte, 4000)
				for {
					_, from, err := u.ReadFromUDP(b)
					if err != nil {
						return
					}
					_, _ = u.WriteToUDP([]byte(answer), from)
				}
			})
		}
	}
	serve("host")
	in(t, "real", func() { serve("real") })

	h, err := ipvs.New("")
	must(t, err)
	t.Cleanup(h.Close)
	for i, vip := range vips {
		for _, proto := range []ravel.Proto{ravel.TCP, ravel.UDP} {
			s := service(key(proto, vip, servicePort), "rr")
			must(t, h.NewService(s))
			real := []string{"198.51.100.3", "2001:db8:1::3"}[i]
			must(t, h.NewDestination(s, &ipvs.Destination{
				Address: net.ParseIP(real), Port: servicePort, Weight: 1, ConnectionFlags: ipvs.ConnectionFlagDirectRoute,
				AddressFamily: s.AddressFamily,
			}))
		}
	}
	return h
}

// service is a key as IPVS knows it.
func service(k ravel.ServiceKey, scheduler string) *ipvs.Service {
	s := &ipvs.Service{
		Address: k.VIP.AsSlice(), Protocol: uint16(k.Proto), Port: k.Port, SchedName: scheduler,
		AddressFamily: unix.AF_INET, Netmask: 0xffffffff,
	}
	if k.VIP.Is6() {
		s.AddressFamily, s.Netmask = unix.AF_INET6, 128
	}
	return s
}

// answer asks a service from this thread's namespace, with a payload of a size, and returns who answered.
func answer(proto string, to netip.Addr, size int) (string, error) {
	c, err := net.DialTimeout(proto, netip.AddrPortFrom(to, servicePort).String(), 5*time.Second)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	return hello(c, size)
}

func hello(c net.Conn, size int) (string, error) {
	if _, err := c.Write([]byte(strings.Repeat("x", size))); err != nil {
		return "", err
	}
	b := make([]byte, 10)
	n, err := c.Read(b)
	return string(b[:n]), err
}

// What is claimed goes on to IPVS, whole and in fragments; what is not is refused though IPVS and the host have it.
func TestClaimedGoesToIPVS(t *testing.T) {
	nettest.Need(t, nettest.IPVS, nettest.IPSet, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		directors(t)
		g := New(Options{Tables: open(t, iptables.Legacy), Enabled: true})
		for _, claimed := range []bool{true, false, true} {
			var claims []ravel.ServiceKey
			for _, vip := range vips {
				claims = append(claims, key(ravel.TCP, vip, servicePort), key(ravel.UDP, vip, servicePort))
			}
			if !claimed {
				claims = nil
			}
			mustApply(t, g, vips, claims)
			for _, vip := range vips {
				for _, proto := range []string{"tcp", "udp"} {
					sizes := []int{5}
					if proto == "udp" {
						sizes = []int{5, 3000} // the second in fragments
					}
					for _, size := range sizes {
						var who string
						var err error
						in(t, "client", func() { who, err = answer(proto, vip, size) })
						if claimed && (err != nil || who != "real") {
							t.Fatalf("claimed %s %s, %d bytes: answered by %q, %v", proto, vip, size, who, err)
						}
						if !claimed && !errors.Is(err, syscall.ECONNREFUSED) {
							t.Fatalf("unclaimed %s %s, %d bytes: answered by %q, %v", proto, vip, size, who, err)
						}
					}
				}
			}
		}
	})
}

// While a service has no scheduler, new flows wait instead of being refused, and established ones go on.
func TestHoldBack(t *testing.T) {
	nettest.Need(t, nettest.IPVS, nettest.IPSet, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		h := directors(t)
		g := New(Options{Tables: open(t, iptables.Legacy), Enabled: true})
		var claims []ravel.ServiceKey
		for _, vip := range vips {
			claims = append(claims, key(ravel.TCP, vip, servicePort), key(ravel.UDP, vip, servicePort))
		}
		mustApply(t, g, vips, claims)
		for _, vip := range vips {
			k := key(ravel.TCP, vip, servicePort)
			var open net.Conn
			in(t, "client", func() {
				var err error
				open, err = net.Dial("tcp", netip.AddrPortFrom(vip, servicePort).String())
				if err != nil {
					t.Error(err)
				}
			})
			if t.Failed() {
				return
			}
			established := func() {
				t.Helper()
				_ = open.SetDeadline(time.Now().Add(3 * time.Second))
				if who, err := hello(open, 5); who != "real" || err != nil {
					t.Fatalf("the established flow to %s: %q, %v", vip, who, err)
				}
			}
			established()

			must(t, h.UpdateService(service(k, "none")))
			var err error
			in(t, "client", func() { _, err = answer("tcp", vip, 5) })
			if !errors.Is(err, syscall.ECONNREFUSED) {
				t.Fatalf("without a scheduler, and not held back: %v; the test shows nothing", err)
			}
			must(t, h.UpdateService(service(k, "rr")))

			outer, err := g.HoldBack(k)
			must(t, err)
			inner, err := g.HoldBack(k)
			must(t, err)
			must(t, h.UpdateService(service(k, "none")))
			type result struct {
				who string
				err error
			}
			got := make(chan result, 1)
			go in(t, "client", func() {
				who, err := answer("tcp", vip, 5)
				got <- result{who, err}
			})
			established()
			select {
			case r := <-got:
				t.Fatalf("a new flow to %s got %q, %v, while it should wait", vip, r.who, r.err)
			case <-time.After(300 * time.Millisecond):
			}
			inner()
			inner()
			if held, _, err := g.sets.list(g.families[0].hold); k.VIP.Is4() && (err != nil || len(held) != 1) {
				t.Fatalf("two hold, one let go twice: %v held, %v", held, err)
			}
			must(t, h.UpdateService(service(k, "rr")))
			outer()
			if r := <-got; r.who != "real" || r.err != nil {
				t.Fatalf("the flow to %s that waited: %q, %v", vip, r.who, r.err)
			}
			established()
			_ = open.Close()
		}
		// Should this process die, the kernel ends the hold by itself.
		release, err := g.HoldBack(claims[0])
		must(t, err)
		defer release()
		if out := nettest.Run(t, "ipset", "list", "ravel4-hold"); !strings.Contains(out, "192.0.2.1,tcp:80 timeout ") {
			t.Fatalf("the hold has no end:\n%s", out)
		}
		// A hold outlives a look at the kernel.
		g.Resync()
		mustApply(t, g, vips, claims)
		if held, _, err := g.sets.list(g.families[0].hold); err != nil || len(held) != 1 {
			t.Fatalf("held %v, %v", held, err)
		}
	})
}

// IPVS lets what comes from port 20 pass by. Without the guard the host's own socket answers; with it nobody does.
func TestWhatIPVSLetsPassIsRefused(t *testing.T) {
	nettest.Need(t, nettest.IPVS, nettest.IPSet, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		directors(t)
		g := New(Options{Tables: open(t, iptables.Legacy), Enabled: true})
		for _, guarded := range []bool{false, true} {
			if guarded {
				var claims []ravel.ServiceKey
				for _, vip := range vips {
					claims = append(claims, key(ravel.TCP, vip, servicePort), key(ravel.UDP, vip, servicePort))
				}
				mustApply(t, g, vips, claims)
			}
			for _, vip := range vips {
				for _, proto := range []string{"tcp", "udp"} {
					d := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{Port: 20}}
					if proto == "udp" {
						d.LocalAddr = &net.UDPAddr{Port: 20}
					}
					var who string
					var err error
					in(t, "client", func() {
						var c net.Conn
						if c, err = d.Dial(proto, netip.AddrPortFrom(vip, servicePort).String()); err != nil {
							return
						}
						defer func() { _ = c.Close() }()
						if tcp, is := c.(*net.TCPConn); is {
							_ = tcp.SetLinger(0) // the port is needed again
						}
						_ = c.SetDeadline(time.Now().Add(3 * time.Second))
						who, err = hello(c, 5)
					})
					if !guarded && who != "host" {
						t.Fatalf("unguarded %s %s from port 20: answered by %q, %v; the test shows nothing", proto, vip, who, err)
					}
					if guarded && !errors.Is(err, syscall.ECONNREFUSED) {
						t.Fatalf("%s %s from port 20: answered by %q, %v", proto, vip, who, err)
					}
				}
			}
		}
	})
}
