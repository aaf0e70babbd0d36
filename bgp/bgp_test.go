package bgp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

const ourASN = 64600

// speaker makes a Speaker that the test's end closes.
func speaker(t testing.TB, o Options) *Speaker {
	t.Helper()
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelInfo}))
	}
	s := New(o)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", b[:len(b)-1])
	return len(b), nil
}

// peer returns the settings that reach a router.
func (r *router) peer() ravel.Peer {
	return ravel.Peer{
		Addr: r.addr.Addr(), Port: r.addr.Port(), ASN: r.asn, LocalASN: ourASN, HoldTime: 9 * time.Second,
		Keepalive: time.Second,
	}
}

func route(prefix, nextHop string) ravel.Route {
	return ravel.Route{Prefix: netip.MustParsePrefix(prefix), NextHop: netip.MustParseAddr(nextHop)}
}

func apply(t testing.TB, s *Speaker, peers []ravel.Peer, routes ...ravel.Route) {
	t.Helper()
	if err := s.Apply(context.Background(), peers, routes); err != nil {
		t.Fatal(err)
	}
}

// status returns how a peer does.
func status(t testing.TB, s *Speaker, addr netip.Addr) PeerStatus {
	t.Helper()
	st, err := s.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range st.Peers {
		if p.Addr == addr {
			return p
		}
	}
	t.Fatalf("no status of %s in %+v", addr, st)
	return PeerStatus{}
}

// wantState waits until a peer is in a state, and its last error has some words.
func wantState(t testing.TB, s *Speaker, r *router, want, words string) {
	t.Helper()
	eventually(t, "the session with "+r.addr.String(), func() error {
		if p := status(t, s, r.addr.Addr()); p.State != want || !strings.Contains(p.LastError, words) {
			return fmt.Errorf("%+v; want %s and %q", p, want, words)
		}
		return nil
	})
}

func TestRoutesReachTheRouter(t *testing.T) {
	external, internal, v6 := newRouter(t, "127.0.1.1", 65001), newRouter(t, "127.0.1.2", ourASN), newRouter(t, "::1", 4200000001)
	s := speaker(t, Options{Node: "d1"})
	peers := []ravel.Peer{external.peer(), internal.peer(), v6.peer()}
	med, pref := uint32(50), uint32(0)
	full := ravel.Route{
		Prefix: netip.MustParsePrefix("192.0.2.2/32"), NextHop: netip.MustParseAddr("10.0.0.7"), MED: &med, LocalPref: &pref,
		Communities:      []ravel.Community{65000<<16 | 1, 65000<<16 | 120},
		LargeCommunities: []ravel.LargeCommunity{{Global: 65000, Local1: 1, Local2: 2}, {Global: 4200000000, Local1: 3, Local2: 4}},
	}
	long := route("192.0.2.3/32", "10.0.0.7")
	long.ASPath = []uint32{ourASN, ourASN}
	bare, bare6 := route("192.0.2.1/32", "10.0.0.7"), route("2001:db8::1/128", "fd00::7")
	apply(t, s, peers, bare, full, bare6, long)
	for _, r := range []*router{external, v6} {
		r.want(
			"192.0.2.1/32 origin 0 as 64600 via 10.0.0.7",
			"192.0.2.2/32 origin 0 as 64600 via 10.0.0.7 med 50 65000:1 65000:120 4200000000:3:4 65000:1:2",
			"192.0.2.3/32 origin 0 as 64600 64600 64600 via 10.0.0.7",
			"2001:db8::1/128 origin 0 as 64600 via fd00::7",
		)
	}
	// GoBGP keeps back from a router of the own AS what that would take for a loop.
	internal.want(
		"192.0.2.1/32 origin 0 as  via 10.0.0.7 pref 100",
		"192.0.2.2/32 origin 0 as  via 10.0.0.7 med 50 pref 0 65000:1 65000:120 4200000000:3:4 65000:1:2",
		"2001:db8::1/128 origin 0 as  via fd00::7 pref 100",
	)

	st, err := s.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range st.Peers {
		p.Since, p.Uptime, p.Updates, p.LastError, p.LastErrorAt = time.Time{}, 0, 0, "", time.Time{}
		st.Peers[i] = p
	}
	st.Changed, st.RouterID = time.Time{}, netip.Addr{}
	up := func(r *router, sent uint64) PeerStatus {
		return PeerStatus{
			Addr: r.addr.Addr(), Port: 1790, ASN: r.asn, LocalASN: ourASN, State: "Established", HoldTime: 9,
			Families: []string{"ipv4", "ipv6"}, Sent: sent,
		}
	}
	want := Status{
		Running: true, Desired: 4, Announced: []netip.Prefix{bare.Prefix, full.Prefix, long.Prefix, bare6.Prefix},
		Peers: []PeerStatus{up(external, 4), up(internal, 3), up(v6, 4)},
	}
	if diff := cmp.Diff(want, st, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
	if _, err := json.Marshal(st); err != nil {
		t.Error(err)
	}
}

// TestOnlyWhatChanged is a story: after each step, who got how many sessions and UPDATEs.
func TestOnlyWhatChanged(t *testing.T) {
	a, b, c := newRouter(t, "127.0.1.1", 65001), newRouter(t, "127.0.1.2", 65002), newRouter(t, "127.0.1.3", 65003)
	registry := prometheus.NewPedanticRegistry()
	s := speaker(t, Options{Node: "d1", Registerer: registry})
	one, two, six := route("192.0.2.1/32", "10.0.0.7"), route("192.0.2.2/32", "10.0.0.7"), route("2001:db8::1/128", "fd00::7")
	moved := one
	moved.NextHop = netip.MustParseAddr("10.0.0.8")
	coloured := six
	coloured.Communities = []ravel.Community{65000<<16 | 1}
	slow := b.peer()
	slow.HoldTime = 12 * time.Second

	steps := []struct {
		name       string
		peers      []ravel.Peer
		routes     []ravel.Route
		a, b, c    string // sessions and UPDATEs since the start; "" is: not a peer
		logA, logB string // what the step sent
	}{
		{"nil routes: sessions, nothing announced", []ravel.Peer{a.peer(), b.peer()}, nil, "1 sessions, 0 updates", "1 sessions, 0 updates", "", "", ""},
		{"announce both families", []ravel.Peer{a.peer(), b.peer()}, []ravel.Route{one, six}, "1 sessions, 2 updates", "1 sessions, 2 updates", "",
			"+ 192.0.2.1/32 + 2001:db8::1/128", "+ 192.0.2.1/32 + 2001:db8::1/128"},
		{"the same again", []ravel.Peer{b.peer(), a.peer()}, []ravel.Route{six, one}, "1 sessions, 2 updates", "1 sessions, 2 updates", "", "", ""},
		{"withdraw before announce", []ravel.Peer{a.peer(), b.peer()}, []ravel.Route{six, two}, "1 sessions, 4 updates", "1 sessions, 4 updates", "",
			"- 192.0.2.1/32 + 192.0.2.2/32", "- 192.0.2.1/32 + 192.0.2.2/32"},
		{"another community re-sends that route", []ravel.Peer{a.peer(), b.peer()}, []ravel.Route{coloured, two}, "1 sessions, 5 updates", "1 sessions, 5 updates", "",
			"+ 2001:db8::1/128", "+ 2001:db8::1/128"},
		{"a third router", []ravel.Peer{a.peer(), b.peer(), c.peer()}, []ravel.Route{coloured, two}, "1 sessions, 5 updates", "1 sessions, 5 updates", "1 sessions, 2 updates", "", ""},
		{"a setting of one peer restarts that one", []ravel.Peer{a.peer(), slow, c.peer()}, []ravel.Route{coloured, two}, "1 sessions, 5 updates", "2 sessions, 7 updates", "1 sessions, 2 updates",
			"", "+ 192.0.2.2/32 + 2001:db8::1/128"},
		{"a peer goes", []ravel.Peer{a.peer(), slow}, []ravel.Route{coloured, two, moved}, "1 sessions, 6 updates", "2 sessions, 8 updates", "",
			"+ 192.0.2.1/32", "+ 192.0.2.1/32"},
		{"nothing wanted", []ravel.Peer{a.peer(), slow}, nil, "1 sessions, 9 updates", "2 sessions, 11 updates", "",
			"- 192.0.2.1/32 - 192.0.2.2/32 - 2001:db8::1/128", "- 192.0.2.1/32 - 192.0.2.2/32 - 2001:db8::1/128"},
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			a.forgetLog()
			b.forgetLog()
			apply(t, s, step.peers, step.routes...)
			apply(t, s, step.peers, step.routes...)
			for _, p := range step.peers {
				eventually(t, "session", func() error {
					if got := status(t, s, p.Addr); got.State != "Established" {
						return fmt.Errorf("%+v", got)
					}
					return nil
				})
			}
			for r, want := range map[*router]string{a: step.a, b: step.b, c: step.c} {
				if want == "" {
					continue
				}
				eventually(t, "router "+r.addr.String(), func() error {
					if got := r.counts(); got != want {
						return fmt.Errorf("%s, want %s", got, want)
					}
					return nil
				})
			}
			if got := a.sorted(); got != step.logA {
				t.Errorf("a heard %q, want %q", got, step.logA)
			}
			if got := b.sorted(); got != step.logB {
				t.Errorf("b heard %q, want %q", got, step.logB)
			}
		})
	}
	// Each step waited for what it wanted. Whatever came beyond it would have come by now, before this keepalive.
	for r, want := range map[*router]string{a: "1 sessions, 9 updates", b: "2 sessions, 11 updates"} {
		r.awaitKeepalive()
		if got := r.counts(); got != want {
			t.Errorf("%s: %s in the end, want %s", r.addr, got, want)
		}
	}
	c.mu.Lock()
	ceases := strings.Join(c.ceases, "; ")
	c.mu.Unlock()
	if want := "NOTIFICATION 6/3 Cease: peer de-configured"; ceases != want {
		t.Errorf("the removed peer heard %q, want %q", ceases, want)
	}

	want := `
# HELP ravel_bgp_announcements_total Routes put into this director's BGP table, new or changed.
# TYPE ravel_bgp_announcements_total counter
ravel_bgp_announcements_total 5
# HELP ravel_bgp_routes_announced Routes in this director's BGP table. Routers have them only while their session is up.
# TYPE ravel_bgp_routes_announced gauge
ravel_bgp_routes_announced 0
# HELP ravel_bgp_routes_desired Routes that this director wants to announce.
# TYPE ravel_bgp_routes_desired gauge
ravel_bgp_routes_desired 0
# HELP ravel_bgp_session_flaps_total Ends of an established BGP session that were not by our own hand.
# TYPE ravel_bgp_session_flaps_total counter
ravel_bgp_session_flaps_total{peer="127.0.1.1"} 0
ravel_bgp_session_flaps_total{peer="127.0.1.2"} 0
# HELP ravel_bgp_session_up 1 while the BGP session with the router is established. It does not say that the router forwards to us.
# TYPE ravel_bgp_session_up gauge
ravel_bgp_session_up{peer="127.0.1.1"} 1
ravel_bgp_session_up{peer="127.0.1.2"} 1
# HELP ravel_bgp_updates_sent_total BGP UPDATE messages sent to the router. It does not say that the router took them in.
# TYPE ravel_bgp_updates_sent_total counter
ravel_bgp_updates_sent_total{peer="127.0.1.1"} 9
ravel_bgp_updates_sent_total{peer="127.0.1.2"} 11
# HELP ravel_bgp_withdrawals_total Routes taken from this director's BGP table.
# TYPE ravel_bgp_withdrawals_total counter
ravel_bgp_withdrawals_total 4
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), "ravel_bgp_announcements_total",
		"ravel_bgp_withdrawals_total", "ravel_bgp_routes_announced", "ravel_bgp_routes_desired", "ravel_bgp_session_up",
		"ravel_bgp_session_flaps_total", "ravel_bgp_updates_sent_total"); err != nil {
		t.Error(err)
	}
}

// TestForeignRoutes: what routers send is neither taken nor passed on, and a full table is turned away.
func TestForeignRoutes(t *testing.T) {
	a, b := newRouter(t, "127.0.1.1", 65001), newRouter(t, "127.0.1.2", 65002)
	s := speaker(t, Options{Node: "d1"})
	peers, own := []ravel.Peer{a.peer(), b.peer()}, route("192.0.2.1/32", "10.0.0.7")
	apply(t, s, peers, own)
	a.want("192.0.2.1/32 origin 0 as 64600 via 10.0.0.7")
	b.want("192.0.2.1/32 origin 0 as 64600 via 10.0.0.7")

	a.announce("0.0.0.0/0", "198.51.100.0/24", "192.0.2.1/32", "192.0.2.9/32")
	eventually(t, "what a sent", func() error {
		if p := status(t, s, a.addr.Addr()); p.Received != 4 {
			return fmt.Errorf("%d received", p.Received)
		}
		return nil
	})
	b.awaitKeepalive()
	if a, b := a.counts(), b.counts(); a != "1 sessions, 1 updates" || b != a {
		t.Errorf("after a's routes: a has %s, b has %s", a, b)
	}
	if got := s.Announced(); len(got) != 1 {
		t.Errorf("announced: %v", got)
	}
	apply(t, s, peers)
	a.want()
	b.want() // not a's 192.0.2.1/32 in its place

	apply(t, s, peers, own)
	var full []string
	for i := range maxReceived + 10 {
		full = append(full, netip.PrefixFrom(netip.AddrFrom4([4]byte{20, byte(i >> 16), byte(i >> 8), byte(i)}), 32).String())
	}
	a.announce(full...)
	wantState(t, s, a, "Idle", "filter what it sends to directors")
	b.awaitKeepalive()
	if got := b.counts(); got != "1 sessions, 3 updates" {
		t.Errorf("b was troubled by a's full table: %s", got)
	}
}

// TestPasswords: right, wrong, and a file that cannot be read stops only its own peer.
func TestPasswords(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	right, wrong, absent := newRouter(t, "127.0.1.1", 65001, "opensesame"), newRouter(t, "127.0.1.2", 65002, "opensesame"), newRouter(t, "127.0.1.3", 65003)
	s := speaker(t, Options{Node: "d1"})
	p, q, x := right.peer(), wrong.peer(), absent.peer()
	p.PasswordFile, q.PasswordFile, x.PasswordFile = file("right", "opensesame\n"), file("wrong", "shut"), filepath.Join(dir, "absent")
	peers := []ravel.Peer{p, q, x}
	err := s.Apply(context.Background(), peers, []ravel.Route{route("192.0.2.1/32", "10.0.0.7")})
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "127.0.1.3") {
		t.Errorf("error %v, want one that names 127.0.1.3's file", err)
	}
	right.want("192.0.2.1/32 origin 0 as 64600 via 10.0.0.7")
	wantState(t, s, wrong, "Active", "its MD5 key differs")
	wantState(t, s, absent, "Idle", "no such file")

	// The key's file vanishes: the session stays on what it knows. Then the other two are mended.
	if err := os.Remove(p.PasswordFile); err != nil {
		t.Fatal(err)
	}
	file("wrong", "opensesame")
	x.PasswordFile = ""
	peers[2] = x
	if err := s.Apply(context.Background(), peers, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want one about the file that vanished", err)
	}
	wrong.wantUps(1)
	absent.wantUps(1)
	if got := right.counts(); got != "1 sessions, 2 updates" {
		t.Errorf("the session whose key's file vanished: %s", got)
	}
}

// smallBuffers makes this host's TCP hold little, until the end of the test.
func smallBuffers(t *testing.T) {
	t.Helper()
	nettest.Need(t, nettest.Root)
	for _, file := range []string{"/proc/sys/net/ipv4/tcp_wmem", "/proc/sys/net/ipv4/tcp_rmem"} {
		before, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(file, []byte("4096 8192 16384"), 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.WriteFile(file, before, 0) })
	}
}

// bigRoutes are 300 routes, 400 kB in all.
func bigRoutes() []ravel.Route {
	var routes []ravel.Route
	for i := range 300 {
		r := route(netip.PrefixFrom(netip.AddrFrom4([4]byte{20, 0, byte(i >> 8), byte(i)}), 32).String(), "10.0.0.7")
		for j := range 120 {
			r.LargeCommunities = append(r.LargeCommunities, ravel.LargeCommunity{Global: 65000, Local2: uint32(j)})
		}
		routes = append(routes, r)
	}
	return routes
}

// TestEndWithARouterThatDoesNotRead: the planned end and Close are over long before that router's hold time.
func TestEndWithARouterThatDoesNotRead(t *testing.T) {
	smallBuffers(t)
	stuck, fine := newRouter(t, "127.0.1.1", 65001), newRouter(t, "127.0.1.2", 65002)
	var log lockedBuffer
	s := New(Options{Node: "d1", Log: slog.New(slog.NewTextHandler(&log, nil)), StopWait: -1})
	p, q := stuck.peer(), fine.peer()
	p.HoldTime = 2 * time.Minute
	apply(t, s, []ravel.Peer{p, q})
	stuck.wantUps(1)
	fine.wantUps(1)
	stuck.with(func() { stuck.frozen = true })
	apply(t, s, []ravel.Peer{p, q}, bigRoutes()...)
	eventually(t, "the other router", func() error {
		if got := fine.counts(); got != "1 sessions, 300 updates" {
			return errors.New(got)
		}
		return nil
	})
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := s.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop: %v", err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("Stop took %s", took)
	}
	fine.want()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 6*time.Second {
		t.Errorf("Stop and Close took %s", took)
	}
	if !strings.Contains(log.String(), "a router that does not read") {
		t.Errorf("it is not logged:\n%s", log.String())
	}
	// Nothing is left once the router is gone.
	stuck.stop()
	ctx, cancel = context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := s.CloseContext(ctx); err != nil {
		t.Error(err)
	}
}

// lockedBuffer is a buffer that many may write to.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestRouterStopsReading: a router that hangs with its buffers full holds up neither the others nor Apply nor Stop.
func TestRouterStopsReading(t *testing.T) {
	smallBuffers(t)
	stuck, fine := newRouter(t, "127.0.1.1", 65001), newRouter(t, "127.0.1.2", 65002)
	s := speaker(t, Options{Node: "d1", Log: slog.New(slog.DiscardHandler), StopWait: -1})
	p, q := stuck.peer(), fine.peer()
	p.HoldTime = 3 * time.Second
	apply(t, s, []ravel.Peer{p, q})
	stuck.wantUps(1)
	fine.wantUps(1)
	stuck.with(func() { stuck.frozen = true })

	routes := bigRoutes()
	apply(t, s, []ravel.Peer{p, q}, routes...)
	eventually(t, "the other router", func() error {
		if got := fine.counts(); got != "1 sessions, 300 updates" {
			return errors.New(got)
		}
		return nil
	})
	began := time.Now()
	p.Multihop = 2 // restarts the session with the stuck one
	apply(t, s, []ravel.Peer{p, q}, routes[1:]...)
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("Apply took %s", took)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	began = time.Now()
	_ = s.Stop(ctx) // its error depends on how far it got
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("Stop took %s", took)
	}
	_ = s.Close()
	if took := time.Since(began); took > 3*p.HoldTime {
		t.Errorf("Close took %s", took)
	}
}
