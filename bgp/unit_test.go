package bgp

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
)

func TestFaultyRoutes(t *testing.T) {
	for name, r := range map[string]ravel.Route{
		"no prefix of a VIP":            {},
		"not a /32 or /128":             route("192.0.2.0/24", "10.0.0.7"),
		"is of the other family":        route("192.0.2.1/32", "fd00::7"),
		"no address that a router can":  {Prefix: netip.MustParsePrefix("192.0.2.1/32")},
		"next hop ::: no address that":  route("2001:db8::1/128", "::"),
		"next hop ::ffff:10.0.0.7: no ": route("2001:db8::1/128", "::ffff:10.0.0.7"),
	} {
		fine := route("192.0.2.2/32", "10.0.0.7")
		good, bad, err := checkRoutes([]ravel.Route{r, fine, fine})
		if err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "192.0.2.2/32: wanted twice") {
			t.Errorf("%s: error %v", name, err)
		}
		if len(good) != 1 || !bad[r.Prefix] || bad[fine.Prefix] {
			t.Errorf("%s: good %v, bad %v", name, good, bad)
		}
	}
}

func TestFaultyPeers(t *testing.T) {
	s := speaker(t, Options{})
	fine := ravel.Peer{Addr: netip.MustParseAddr("192.0.2.1"), ASN: 1, LocalASN: 2, HoldTime: 9 * time.Second}
	for name, change := range map[string]func(p *ravel.Peer){
		"no address of a router":          func(p *ravel.Peer) { p.Addr = netip.Addr{} },
		": AS number 0":                   func(p *ravel.Peer) { p.ASN = 0 },
		"local AS number 0":               func(p *ravel.Peer) { p.LocalASN = 0 },
		"hold time 0s":                    func(p *ravel.Peer) { p.HoldTime = 0 },
		"hold time 3.5s":                  func(p *ravel.Peer) { p.HoldTime = 3500 * time.Millisecond },
		"keepalive 9s":                    func(p *ravel.Peer) { p.Keepalive = 9 * time.Second },
		"is of the other family":          func(p *ravel.Peer) { p.LocalAddr = netip.MustParseAddr("::1") },
		"passive, but no listening port":  func(p *ravel.Peer) { p.Passive = true },
		"/nonexistent: no such file or d": func(p *ravel.Peer) { p.PasswordFile = "/nonexistent" },
		"/dev/null: empty":                func(p *ravel.Peer) { p.PasswordFile = "/dev/null" },
	} {
		p := fine
		change(&p)
		if _, err := s.checkPeer(p); err == nil || !strings.Contains(": "+err.Error(), name) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	got, err := s.checkPeer(fine)
	want := settings{Peer: fine}
	want.Port, want.Keepalive = 179, 3*time.Second
	if err != nil || got != want {
		t.Errorf("defaults: %+v, %v", got, err)
	}
}

func TestRouterID(t *testing.T) {
	local := func(addrs ...string) map[netip.Addr]settings {
		peers := map[netip.Addr]settings{}
		for i, addr := range addrs {
			p := settings{}
			p.LocalAddr = netip.MustParseAddr(addr)
			peers[netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})] = p
		}
		return peers
	}
	id := func(o Options, peers map[netip.Addr]settings) string { return New(o).routerIDFor(peers).String() }
	if got := id(Options{RouterID: netip.MustParseAddr("192.0.2.9")}, local("192.0.2.1")); got != "192.0.2.9" {
		t.Errorf("set: %s", got)
	}
	late := New(Options{RouterID: netip.MustParseAddr("192.0.2.9"), Node: "d1"})
	late.SetRouterID(netip.MustParseAddr("192.0.2.7"))
	if got := late.routerIDFor(local("192.0.2.1")).String(); got != "192.0.2.7" {
		t.Errorf("set late: %s", got)
	}
	late.SetRouterID(netip.Addr{})
	if got := late.routerIDFor(local("192.0.2.1")).String(); got != "192.0.2.1" {
		t.Errorf("set and taken back: %s", got)
	}
	if got := id(Options{Node: "d1"}, local("192.0.2.2", "fd00::1", "192.0.2.1", "0.0.0.0")); got != "192.0.2.1" {
		t.Errorf("from the local addresses: %s", got)
	}
	if a, b, c := id(Options{Node: "d1"}, local("fd00::1")), id(Options{Node: "d1"}, nil), id(Options{Node: "d2"}, nil); a != b || a == c {
		t.Errorf("from the node's name: %s %s %s", a, b, c)
	}
}

func TestNotificationWords(t *testing.T) {
	for want, in := range map[string][2]uint8{
		`NOTIFICATION 6/2 Cease: administrative shutdown ("bye")`: {6, 2},
		`NOTIFICATION 4/0 hold timer expired ("bye")`:             {4, 0},
		`NOTIFICATION 6/99 Cease ("bye")`:                         {6, 99},
		`NOTIFICATION 77/1 ("bye")`:                               {77, 1},
	} {
		if got := notification(in[0], in[1], "bye"); got != want {
			t.Errorf("%v: %s, want %s", in, got, want)
		}
	}
}

// TestDue: which sessions the keeper takes out of GoBGP's own waits, and when.
func TestDue(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		s     session
		due   bool
		again time.Duration
	}{
		"after a failure":                  {session{state: idle, idle: true, failures: 1}, true, time.Hour},
		"after the last quick retry":       {session{state: idle, idle: true, failures: quickRetries}, true, time.Hour},
		"after too many":                   {session{state: idle, idle: true, failures: quickRetries + 1}, false, time.Hour},
		"at the start":                     {session{state: idle}, false, time.Hour},
		"dialling":                         {session{state: active}, false, time.Hour},
		"too many routes, just now":        {session{state: idle, idle: true, capped: true, since: now.Add(-time.Second)}, false, cappedPause - time.Second},
		"too many routes, a while ago":     {session{state: idle, idle: true, capped: true, since: now.Add(-cappedPause)}, true, time.Hour},
		"no OPEN yet":                      {session{state: openSent, since: now.Add(-time.Second)}, false, minOpenWait - time.Second},
		"no OPEN for long":                 {session{state: openSent, since: now.Add(-minOpenWait)}, true, time.Hour},
		"no OPEN yet with a long hold":     {session{state: openSent, peer: ravel.Peer{HoldTime: time.Minute}, since: now.Add(-minOpenWait)}, false, time.Minute - minOpenWait},
		"established for longer than that": {session{state: established, since: now.Add(-time.Hour)}, false, time.Hour},
	} {
		table := newSessions(slog.New(slog.DiscardHandler))
		addr := netip.MustParseAddr("192.0.2.1")
		table.table[addr] = &c.s
		due, again := table.due(now)
		if slices.Contains(due, addr) != c.due || again != c.again {
			t.Errorf("%s: due %v, again in %s; want %v, %s", name, due, again, c.due, c.again)
		}
	}
}

// TestBadPartsStopNothing: what cannot be had is named, what was held of it stays, the rest is done.
func TestBadPartsStopNothing(t *testing.T) {
	s := speaker(t, Options{Node: "d1"})
	peer := ravel.Peer{Addr: netip.MustParseAddr("127.0.9.9"), ASN: 1, LocalASN: ourASN, HoldTime: 9 * time.Second}
	bad := peer
	bad.Addr, bad.HoldTime = netip.MustParseAddr("127.0.9.8"), 0
	a, b := route("192.0.2.1/32", "10.0.0.7"), route("192.0.2.2/32", "10.0.0.7")
	apply(t, s, []ravel.Peer{peer}, a)
	changed := a
	changed.NextHop = netip.MustParseAddr("fd00::7")
	err := s.Apply(context.Background(), []ravel.Peer{bad, peer}, []ravel.Route{changed, b})
	if err == nil || !strings.Contains(err.Error(), "127.0.9.8") || !strings.Contains(err.Error(), "192.0.2.1/32") {
		t.Errorf("error %v", err)
	}
	if diff := cmp.Diff([]string{"192.0.2.1/32", "192.0.2.2/32"}, texts(s.Announced())); diff != "" {
		t.Errorf("announced (-want +got):\n%s", diff)
	}
	if p := status(t, s, bad.Addr); !strings.Contains(p.LastError, "hold time 0s") || p.State != "Idle" {
		t.Errorf("the bad peer: %+v", p)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Apply(ctx, []ravel.Peer{peer}, []ravel.Route{route("192.0.2.3/32", "10.0.0.7")}); err == nil {
		t.Error("no error of a context that has ended")
	}
	if got := s.Announced(); len(got) != 0 {
		t.Errorf("announced %v: a context that has ended must not stop withdrawals", got)
	}
	if st, _ := s.Status(context.Background()); len(st.Peers) != 1 {
		t.Errorf("peers: %+v", st.Peers)
	}
}

func texts[T fmt.Stringer](list []T) []string {
	var s []string
	for _, v := range list {
		s = append(s, v.String())
	}
	return s
}

// BenchmarkApply changes one of 1,000 routes.
func BenchmarkApply(b *testing.B) {
	s := speaker(b, Options{Node: "d1", Log: slog.New(slog.DiscardHandler)})
	peers := []ravel.Peer{{Addr: netip.MustParseAddr("127.0.9.9"), ASN: 1, LocalASN: ourASN, HoldTime: 9 * time.Second}}
	var routes []ravel.Route
	for i := range 1000 {
		routes = append(routes, route(fmt.Sprintf("192.0.%d.%d/32", i>>8, i&255), "10.0.0.7"))
	}
	apply(b, s, peers, routes...)
	hops := []netip.Addr{netip.MustParseAddr("10.0.0.8"), netip.MustParseAddr("10.0.0.9")}
	for i := 0; b.Loop(); i++ {
		routes[500].NextHop = hops[i%2]
		apply(b, s, peers, routes...)
	}
}
