package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
)

// world is a host and its routers as the appliers would leave them. After each single change it checks the promises.
type world struct {
	t         *testing.T
	services  map[ravel.ServiceKey]ravel.VirtualService
	links     map[netip.Addr]bool
	announced map[netip.Addr]bool
	guarded   map[netip.Addr]bool
	claimed   map[ravel.ServiceKey]bool
	untracked map[ravel.ServiceKey]bool
	redirects map[ravel.ServiceKey]bool
	foreign   map[ravel.ServiceKey]bool // services of others in IPVS, which are there from the start
	director  bool

	fail    func() bool // whether the next change fails
	changes int
}

var errInjected = errors.New("injected")

func newWorld(t *testing.T) *world {
	return &world{
		t: t, services: map[ravel.ServiceKey]ravel.VirtualService{}, links: map[netip.Addr]bool{},
		announced: map[netip.Addr]bool{}, guarded: map[netip.Addr]bool{}, claimed: map[ravel.ServiceKey]bool{},
		untracked: map[ravel.ServiceKey]bool{}, redirects: map[ravel.ServiceKey]bool{}, fail: func() bool { return false }, director: true,
	}
}

// check holds the world against the promises; what says which change was the last.
func (w *world) check(what string) {
	w.t.Helper()
	w.changes++
	for vip := range w.announced {
		takes := false
		for key, s := range w.services {
			takes = takes || key.VIP == vip && s.TakesNewFlows()
		}
		if !takes {
			w.t.Fatalf("after %s: %s is announced and no service of it takes new flows", what, vip)
		}
		if !w.links[vip] {
			w.t.Fatalf("after %s: %s is announced and no link holds it", what, vip)
		}
	}
	for vip := range w.links {
		if !w.guarded[vip] {
			w.t.Fatalf("after %s: a link holds %s and nothing guards it", what, vip)
		}
		if !w.director && !slices.ContainsFunc(sortedKeys(w.redirects), func(k ravel.ServiceKey) bool { return k.VIP == vip }) {
			w.t.Fatalf("after %s: this node holds %s and has no redirect of it", what, vip)
		}
	}
	for key := range w.foreign {
		if w.guarded[key.VIP] && !w.claimed[key] {
			w.t.Fatalf("after %s: the guard rejects %s, which IPVS serves for somebody else", what, key)
		}
	}
	for key := range w.claimed {
		if _, held := w.services[key]; !held && w.links[key.VIP] && !w.foreign[key] {
			w.t.Fatalf("after %s: the guard lets %s pass to a service that is not there", what, key)
		}
	}
}

func sortedKeys(m map[ravel.ServiceKey]bool) []ravel.ServiceKey {
	var keys []ravel.ServiceKey
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, ravel.ServiceKey.Compare)
	return keys
}

type fakeIPVS struct{ *world }

func (f fakeIPVS) Read(context.Context) ([]ravel.VirtualService, error) {
	if f.fail() {
		return nil, errInjected
	}
	var all []ravel.VirtualService
	for _, s := range f.services {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b ravel.VirtualService) int { return a.Key.Compare(b.Key) })
	return all, nil
}

func (f fakeIPVS) Apply(_ context.Context, want []ravel.VirtualService) ([]ravel.ServiceKey, error) {
	if first := f.fail(); first && f.fail() {
		return nil, director.ErrUnknown
	}
	var errs []error
	wanted := map[ravel.ServiceKey]bool{}
	for _, s := range want {
		wanted[s.Key] = true
	}
	for key := range f.services {
		if !wanted[key] {
			delete(f.services, key)
			f.check("deleting " + key.String())
		}
	}
	var held []ravel.ServiceKey
	for _, s := range want {
		if f.fail() {
			errs = append(errs, fmt.Errorf("programming %s: %w", s.Key, errInjected))
			continue
		}
		if f.foreign[s.Key] {
			continue // a Problem
		}
		f.services[s.Key] = s
		f.check("programming " + s.Key.String())
		held = append(held, s.Key)
	}
	return held, errors.Join(errs...)
}

func (f fakeIPVS) Foreign() []ravel.ServiceKey {
	return sortedKeys(f.foreign)
}

func (fakeIPVS) Problems() []ravel.Problem { return nil }
func (fakeIPVS) Resync()                   {}
func (fakeIPVS) Changed() <-chan struct{}  { return nil }

type fakeLinks struct{ *world }

func (f fakeLinks) Read(context.Context) ([]netip.Addr, error) {
	if f.fail() {
		return nil, errInjected
	}
	var held []netip.Addr
	for vip := range f.links {
		held = append(held, vip)
	}
	slices.SortFunc(held, netip.Addr.Compare)
	return held, nil
}

func (f fakeLinks) Apply(_ context.Context, want []ravel.Addr) ([]netip.Addr, error) {
	wanted := map[netip.Addr]bool{}
	var err error
	for _, a := range want {
		wanted[a.VIP] = true
		if f.links[a.VIP] {
			continue
		}
		if f.fail() {
			err = errInjected
			continue
		}
		f.links[a.VIP] = true
		f.check("adding address " + a.VIP.String())
	}
	for vip := range f.links {
		if !wanted[vip] {
			delete(f.links, vip)
			f.check("removing address " + vip.String())
		}
	}
	var held []netip.Addr
	for vip := range f.links {
		held = append(held, vip)
	}
	slices.SortFunc(held, netip.Addr.Compare)
	return held, err
}

func (fakeLinks) NextExpiry() (time.Time, bool) { return time.Time{}, false }
func (fakeLinks) Problems() []ravel.Problem     { return nil }
func (fakeLinks) Resync()                       {}
func (fakeLinks) Changed() <-chan struct{}      { return nil }

type fakeGuard struct{ *world }

// Apply fails for one family at a time.
func (f fakeGuard) Apply(_ context.Context, vips []netip.Addr, claimed, foreign []ravel.ServiceKey) (guarded []netip.Addr, err error) {
	for _, is4 := range []bool{true, false} {
		if f.fail() {
			err = errInjected
			continue
		}
		maps.DeleteFunc(f.guarded, func(vip netip.Addr, _ bool) bool { return vip.Is4() == is4 })
		maps.DeleteFunc(f.claimed, func(key ravel.ServiceKey, _ bool) bool { return key.VIP.Is4() == is4 })
		for _, vip := range vips {
			if vip.Is4() == is4 {
				f.guarded[vip] = true
				guarded = append(guarded, vip)
			}
		}
		maps.DeleteFunc(f.untracked, func(key ravel.ServiceKey, _ bool) bool { return key.VIP.Is4() == is4 })
		for _, key := range slices.Concat(claimed, foreign) {
			if key.VIP.Is4() == is4 {
				f.claimed[key] = true
				f.untracked[key] = !slices.Contains(foreign, key)
			}
		}
		for key := range f.foreign {
			if f.untracked[key] {
				f.t.Fatalf("packets of %s, which is somebody else's, are not tracked", key)
			}
		}
		f.check("changing the guard")
	}
	return guarded, err
}

func (fakeGuard) Problems() []ravel.Problem { return nil }
func (fakeGuard) Resync()                   {}
func (fakeGuard) Look(context.Context) bool { return false }

type fakeBGP struct{ *world }

func (f fakeBGP) Apply(_ context.Context, _ []ravel.Peer, routes []ravel.Route) error {
	wanted := map[netip.Addr]bool{}
	for _, r := range routes {
		wanted[r.Prefix.Addr()] = true
	}
	for vip := range f.announced {
		if !wanted[vip] {
			delete(f.announced, vip)
			f.check("withdrawing " + vip.String())
		}
	}
	for vip := range wanted {
		if !f.announced[vip] && f.fail() {
			return errInjected
		}
		f.announced[vip] = true
		f.check("announcing " + vip.String())
	}
	return nil
}

func (f fakeBGP) Announced() []netip.Prefix {
	var prefixes []netip.Prefix
	for vip := range f.announced {
		prefixes = append(prefixes, netip.PrefixFrom(vip, vip.BitLen()))
	}
	slices.SortFunc(prefixes, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return prefixes
}

func (f fakeBGP) Stop(context.Context) error {
	f.world.announced = map[netip.Addr]bool{}
	return nil
}

type fakeRedirects struct{ *world }

func (f fakeRedirects) Apply(_ context.Context, want []ravel.Redirect, _ []netip.Addr) ([]ravel.ServiceKey, error) {
	if f.fail() {
		return sortedKeys(f.redirects), errInjected
	}
	f.world.redirects = map[ravel.ServiceKey]bool{}
	for _, r := range want {
		f.world.redirects[r.Key] = true
	}
	f.check("changing redirects")
	return sortedKeys(f.world.redirects), nil
}

func (f fakeRedirects) Read(context.Context) ([]ravel.Redirect, error) {
	if f.fail() {
		return nil, errInjected
	}
	var list []ravel.Redirect
	for _, key := range sortedKeys(f.redirects) {
		list = append(list, ravel.Redirect{Key: key})
	}
	return list, nil
}

func (fakeRedirects) Problems() []ravel.Problem { return nil }
func (fakeRedirects) Resync()                   {}
func (fakeRedirects) Look(context.Context) bool { return false }

// randomState is a wanted state whose routes obey Compute's rule, as Compute's always do.
func randomState(rng *rand.Rand) ravel.State {
	var s ravel.State
	for _, vip := range []netip.Addr{vip1, netip.MustParseAddr("192.0.2.3"), vip2} {
		if rng.IntN(3) == 0 {
			continue
		}
		all := rng.IntN(2) == 0
		for port := uint16(80); port < 83; port++ {
			if rng.IntN(3) == 0 {
				continue
			}
			v := ravel.VirtualService{Key: ravel.ServiceKey{VIP: vip, Proto: ravel.TCP, Port: port}, Scheduler: ravel.MH}
			for letter := byte('a'); letter < 'e'; letter++ {
				if rng.IntN(2) == 0 {
					weight := rng.IntN(3)
					v.RealServers = append(v.RealServers, ravel.RealServer{
						Addr: server(letter, vip), Weight: weight, LastWeight: weight,
					})
					if rs := &v.RealServers[len(v.RealServers)-1]; weight == 0 {
						rs.LastWeight = 1 + rng.IntN(2)
					}
				}
			}
			s.Services = append(s.Services, v)
			s.Redirects = append(s.Redirects, ravel.Redirect{Key: v.Key})
			if a := (ravel.Addr{VIP: vip}); len(s.Addrs) == 0 || s.Addrs[len(s.Addrs)-1] != a {
				s.Addrs = append(s.Addrs, a)
			}
		}
		s.Routes = append(s.Routes, ravel.Route{Prefix: netip.PrefixFrom(vip, vip.BitLen()), NeedsAll: all})
	}
	s.Routes = servable(s.Routes, s.Services)
	return s
}

// Promise P1 at every single change, through random states, faults at any point, and restarts of the process.
func TestDirectorNeverAnnouncesWhatItDoesNotHold(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	changes := 0
	for range 200 {
		w := newWorld(t)
		w.foreign = map[ravel.ServiceKey]bool{{VIP: vip1, Proto: ravel.TCP, Port: 90}: true, {VIP: vip2, Proto: ravel.UDP, Port: 80}: true}
		linger := time.Duration(rng.IntN(3)) * time.Second
		start := func() *directorWalk {
			return &directorWalk{DirectorConfig: DirectorConfig{IPVS: fakeIPVS{w}, Guard: fakeGuard{w}, Links: fakeLinks{w}, BGP: fakeBGP{w}, Linger: linger}}
		}
		d, now, want := start(), time.Unix(1_000_000, 0), randomState(rng)
		for range 40 {
			faults := rng.IntN(4) == 0
			w.fail = func() bool { return faults && rng.IntN(4) == 0 }
			switch rng.IntN(6) {
			case 0:
				if rng.IntN(2) == 0 { // a planned stop, else a crash: the routers see the session end either way
					if err := d.stop(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				w.announced = map[netip.Addr]bool{}
				d = start()
			case 1, 2:
				want = randomState(rng)
			}
			now = now.Add(time.Duration(rng.IntN(1500)) * time.Millisecond)
			_, _ = d.step(t.Context(), want, now) // faults are the point
		}

		// Without faults, time leads to exactly what is wanted.
		w.fail = func() bool { return false }
		for range 5 {
			now = now.Add(20 * time.Second)
			if _, err := d.step(t.Context(), want, now); err != nil {
				t.Fatalf("without faults: %v", err)
			}
		}
		got, _ := fakeIPVS{w}.Read(t.Context())
		reached := ravel.State{Services: got}
		for _, prefix := range (fakeBGP{w}).Announced() {
			at := slices.IndexFunc(want.Routes, func(r ravel.Route) bool { return r.Prefix == prefix })
			reached.Routes = append(reached.Routes, ravel.Route{Prefix: prefix, NeedsAll: at >= 0 && want.Routes[at].NeedsAll})
		}
		// The slots of those that drain are as they were when they began to.
		for _, s := range reached.Services {
			for i := range s.RealServers {
				at := slices.IndexFunc(want.Services, func(w ravel.VirtualService) bool { return w.Key == s.Key })
				if s.RealServers[i].Weight == 0 && at >= 0 && i < len(want.Services[at].RealServers) {
					s.RealServers[i].LastWeight = want.Services[at].RealServers[i].LastWeight
				}
			}
		}
		if words(reached) != words(want) {
			t.Fatalf("reached %q\nwanted %q", words(reached), words(want))
		}
		if len(w.links) != len(want.Addrs) {
			t.Fatalf("links hold %v, wanted %v", w.links, want.Addrs)
		}
		for key := range w.services {
			if !w.untracked[key] {
				t.Fatalf("others may take the packets of %s by nat", key)
			}
		}
		before := w.changes
		if _, err := d.step(t.Context(), want, now); err != nil {
			t.Fatal(err)
		}
		changes += before
	}
	if changes < 10000 {
		t.Fatalf("only %d changes were checked", changes)
	}
}

// A node holds a VIP only while it has a redirect of it, and never without its guard.
func TestRealserverHoldsOnlyWhatItRedirects(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		w := newWorld(t)
		w.director = false
		start := func() *realserverWalk {
			return &realserverWalk{RealserverConfig: RealserverConfig{Redirects: fakeRedirects{w}, Guard: fakeGuard{w}, Links: fakeLinks{w}, Linger: time.Second}}
		}
		r, now, want := start(), time.Unix(1_000_000, 0), randomState(rng)
		for range 40 {
			faults := rng.IntN(4) == 0
			w.fail = func() bool { return faults && rng.IntN(3) == 0 }
			switch rng.IntN(5) {
			case 0:
				r = start()
			case 1, 2:
				want = randomState(rng)
			}
			now = now.Add(time.Duration(rng.IntN(700)) * time.Millisecond)
			_, _ = r.step(t.Context(), want, now) // faults are the point
		}
		w.fail = func() bool { return false }
		for range 3 {
			now = now.Add(2 * time.Second)
			if _, err := r.step(t.Context(), want, now); err != nil {
				t.Fatalf("without faults: %v", err)
			}
		}
		if len(w.redirects) != len(want.Redirects) || len(w.links) != len(want.Addrs) {
			t.Fatalf("reached %v on %v\nwanted %v on %v", sortedKeys(w.redirects), w.links, want.Redirects, want.Addrs)
		}
	}
}

// A service of ours that another program takes over in IPVS, as kube-proxy does where it works with IPVS and knows the
// VIP, is left to it: the VIP is not announced from here, and its packets are tracked again, which that program needs. A
// VIP that was not taken is announced all the while.
func TestServiceTakenOver(t *testing.T) {
	w := newWorld(t)
	w.foreign = map[ravel.ServiceKey]bool{}
	d := &directorWalk{DirectorConfig: DirectorConfig{IPVS: fakeIPVS{w}, Guard: fakeGuard{w}, Links: fakeLinks{w}, BGP: fakeBGP{w}}}
	var want ravel.State
	taken := ravel.ServiceKey{VIP: vip1, Proto: ravel.TCP, Port: 80}
	for _, key := range []ravel.ServiceKey{taken, {VIP: vip1, Proto: ravel.TCP, Port: 90}, {VIP: vip2, Proto: ravel.TCP, Port: 80}} {
		want.Services = append(want.Services, ravel.VirtualService{Key: key, RealServers: []ravel.RealServer{
			{Addr: netip.MustParseAddr("10.0.0.1"), Weight: 1, LastWeight: 1},
		}})
	}
	for _, vip := range []netip.Addr{vip1, vip2} {
		want.Addrs = append(want.Addrs, ravel.Addr{VIP: vip})
		want.Routes = append(want.Routes, ravel.Route{Prefix: netip.PrefixFrom(vip, vip.BitLen())})
	}
	now := time.Unix(1_000_000, 0)
	expect := func(when string, first, untracked bool) {
		t.Helper()
		for range 2 {
			if _, err := d.step(t.Context(), want, now); err != nil {
				t.Fatal(err)
			}
			now = now.Add(time.Minute)
		}
		if w.announced[vip1] != first || !w.announced[vip2] || w.untracked[taken] != untracked || !w.claimed[taken] {
			t.Fatalf("%s: announced %v, untracked %v, claimed %v", when, w.announced, w.untracked, w.claimed)
		}
	}
	expect("ours", true, true)
	delete(w.services, taken)
	w.foreign[taken] = true
	expect("taken over", false, false)
	delete(w.foreign, taken)
	delete(w.claimed, taken) // or the world would complain of the moment before the director looks
	expect("ours again", true, true)
}
