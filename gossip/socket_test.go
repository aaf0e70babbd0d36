package gossip

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
)

// Over real sockets of the loopback interface.
func TestSockets(t *testing.T) {
	for _, ip := range []string{"127.0.0.", "::1"} {
		t.Run(ip, func(t *testing.T) {
			w := &world{t: t, key: keyFile(t, NewKey())}
			var all []*process
			for n := range 3 {
				c := w.config(n+1, ravel.Director)
				c.Bind = netip.AddrPortFrom(netip.MustParseAddr("::1"), uint16(7000+n))
				if ip != "::1" {
					c.Bind = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, byte(1 + n)}), DefaultPort)
				}
				g, err := New(c)
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, w.run(g))
				w.seeds = []string{all[0].addr.String()}
			}
			for _, p := range all {
				until(t, "all settle", 30*time.Second, func() bool { return p.fleet().Settled && len(p.fleet().Members) == 3 })
			}
			var entries []ravel.RosterEntry
			for n := range 200 { // too big for a packet
				entries = append(entries, entry(n, uint64(n+1), ravel.Active))
			}
			all[2].Write(service(1), entries)
			for _, p := range all {
				took := until(t, "all hear of a roster", 20*time.Second, func() bool { return len(p.fleet().Rosters[service(1)]) == 200 })
				t.Logf("%s heard it after %s", p.config.Name, took)
			}
			all[1].stop()
			took := all[0].sees("d2", ravel.Dead, 20*time.Second)
			t.Logf("dead after %s, bound %s", took, Fast.DetectWithin(3))
		})
	}
}

// A port that is taken is known before Run, and given back by Close; on a host without IPv6 [::] is 0.0.0.0.
func TestOpen(t *testing.T) {
	w := &world{t: t, key: keyFile(t, NewKey())}
	build := func(ipv6 bool) *Gossip {
		c := w.config(1, ravel.Director)
		c.Bind = netip.AddrPortFrom(netip.IPv6Unspecified(), 7100)
		g, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		g.ipv6 = func() bool { return ipv6 }
		return g
	}
	for _, ipv6 := range []bool{true, false} {
		g := build(ipv6)
		for range 2 {
			if err := g.Open(); err != nil {
				t.Fatal(err)
			}
		}
		if got := g.memberlistConfig().BindAddr; ipv6 != (got == "::") || !ipv6 != (got == "0.0.0.0") {
			t.Errorf("with IPv6 %t it binds %s", ipv6, got)
		}
		if err := build(ipv6).Open(); err == nil {
			t.Fatal("a port was taken twice")
		}
		// Something that nobody will ever read must not hold up Close.
		for _, network := range []string{"udp4", "tcp4"} {
			c, err := net.Dial(network, "127.0.0.1:7100")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			if _, err := c.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(g.Close(), g.Close()); err != nil {
			t.Fatal(err)
		}
		if g.Run(t.Context()) == nil {
			t.Error("it runs though it is closed")
		}
	}
	g := build(true)
	if err := g.Open(); err != nil {
		t.Fatalf("the port was not given back: %v", err)
	}
	p := w.run(g)
	until(t, "it runs", 20*time.Second, func() bool { return p.fleet().Settled })
	if err := p.Close(); err != nil || !p.fleet().Settled {
		t.Error(err)
	}
}

// One that takes a stream and says nothing does not hold up the end.
func TestStopOfSockets(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.9:7100")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	w := &world{t: t, key: keyFile(t, NewKey()), preset: LAN}
	c := w.config(1, ravel.Director)
	c.Bind, c.Seeds = netip.MustParseAddrPort("127.0.0.1:7101"), []string{silent.Addr().String()}
	g, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	p := w.run(g)
	if _, err := silent.Accept(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	p.stop()
	if took := time.Since(begin); took > 4*time.Second { // a stream that is not answered is given up after 5 s
		t.Errorf("it took %s", took)
	}
}
