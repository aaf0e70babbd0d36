package bgp

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
)

// TestRandomWalk goes from any set of peers and routes to any other, and compares what each router heard with what was
// wanted after every step.
func TestRandomWalk(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	routers := []*router{newRouter(t, "127.0.1.1", 65001), newRouter(t, "127.0.1.2", 65002), newRouter(t, "::1", 65003)}
	s := speaker(t, Options{Node: "d1", Log: new(logbook).logger()})

	peers := map[int]ravel.Peer{0: routers[0].peer()}
	routes := map[netip.Prefix]ravel.Route{}
	updates := make([]int, len(routers))
	const steps = 80
	for step := range steps {
		if step%40 == 20 { // a session takes more than a second to come up, so these are few
			i := rnd.IntN(len(routers))
			if _, held := peers[i]; held && rnd.IntN(2) == 0 {
				delete(peers, i)
			} else {
				p := routers[i].peer()
				p.HoldTime = time.Duration(6+rnd.IntN(20)) * time.Second
				peers[i] = p
			}
		}
		for range rnd.IntN(4) {
			r := randomRoute(rnd)
			if _, there := routes[r.Prefix]; there && rnd.IntN(2) == 0 {
				delete(routes, r.Prefix)
			} else {
				routes[r.Prefix] = r
			}
		}
		want := ""
		for _, p := range slices.SortedFunc(maps.Keys(routes), func(a, b netip.Prefix) int { return strings.Compare(a.String(), b.String()) }) {
			want += routeText(routes[p]) + "\n"
		}
		if err := s.Apply(context.Background(), slices.Collect(maps.Values(peers)), slices.Collect(maps.Values(routes))); err != nil {
			t.Fatalf("seed %d, step %d: %v", seed, step, err)
		}
		for i, r := range routers {
			_, held := peers[i]
			eventually(t, fmt.Sprintf("seed %d, step %d, router %d", seed, step, i), func() error {
				wanted := want
				if !held {
					wanted = ""
				}
				if got := r.table(); got != wanted {
					return fmt.Errorf("\ngot:\n%swant:\n%s", got, wanted)
				}
				return nil
			})
		}
		if got, want := fmt.Sprint(s.Announced()), fmt.Sprint(slices.SortedFunc(maps.Keys(routes), comparePrefixes)); got != want {
			t.Fatalf("seed %d, step %d: announced %s, want %s", seed, step, got, want)
		}
		for i, r := range routers {
			r.with(func() { updates[i] = r.updates })
		}
	}
	t.Logf("%v updates heard", updates)
}

func randomRoute(rnd *rand.Rand) ravel.Route {
	n := rnd.IntN(8)
	r := route(fmt.Sprintf("192.0.2.%d/32", n), fmt.Sprintf("10.0.0.%d", 1+rnd.IntN(2)))
	if rnd.IntN(2) == 0 {
		r = route(fmt.Sprintf("2001:db8::%x/128", 1+n), fmt.Sprintf("fd00::%d", 1+rnd.IntN(2)))
	}
	if rnd.IntN(2) == 0 {
		med := rnd.Uint32N(3)
		r.MED = &med
	}
	for i := range rnd.IntN(3) {
		r.Communities = append(r.Communities, ravel.Community(65000<<16|uint32(i)))
	}
	for i := range rnd.IntN(3) {
		r.LargeCommunities = append(r.LargeCommunities, ravel.LargeCommunity{Global: 65000, Local1: 1, Local2: uint32(i)})
	}
	return r
}

// routeText writes a route as an eBGP router of the tests holds it.
func routeText(r ravel.Route) string {
	s := fmt.Sprintf("%s origin 0 as 64600 via %s", r.Prefix, r.NextHop)
	if r.MED != nil {
		s += fmt.Sprintf(" med %d", *r.MED)
	}
	for _, c := range r.Communities {
		s += " " + c.String()
	}
	for _, c := range r.LargeCommunities {
		s += " " + c.String()
	}
	return s
}
