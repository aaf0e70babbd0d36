package bgp

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
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

func TestRoutesReachTheRouter(t *testing.T) {
	r := newRouter(t, "127.0.1.1", 65001)
	s := speaker(t, Options{Node: "d1"})
	med := uint32(50)
	full := ravel.Route{
		Prefix: netip.MustParsePrefix("192.0.2.2/32"), NextHop: netip.MustParseAddr("10.0.0.7"), MED: &med,
		Communities:      []ravel.Community{65000<<16 | 1, 65000<<16 | 120},
		LargeCommunities: []ravel.LargeCommunity{{Global: 65000, Local1: 1, Local2: 2}, {Global: 4200000000, Local1: 3, Local2: 4}},
	}
	apply(t, s, []ravel.Peer{r.peer()}, route("192.0.2.1/32", "10.0.0.7"), full, route("2001:db8::1/128", "fd00::7"))
	r.want(
		"192.0.2.1/32 origin 0 as 64600 via 10.0.0.7",
		"192.0.2.2/32 origin 0 as 64600 via 10.0.0.7 med 50 65000:1 65000:120 4200000000:3:4 65000:1:2",
		"2001:db8::1/128 origin 0 as 64600 via fd00::7",
	)
}
