package director

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

func with(v ravel.VirtualService, change func(*ravel.VirtualService)) ravel.VirtualService {
	change(&v)
	return v
}

func scheduled(v ravel.VirtualService, s ravel.Scheduler, flags ravel.SchedulerFlags) ravel.VirtualService {
	v.Scheduler, v.Flags = s, flags
	return v
}

func limited(v ravel.VirtualService, upper, lower int) ravel.VirtualService {
	v.UpperThreshold, v.LowerThreshold = upper, lower
	return v
}

// states are tables, each with what ipvsadm -Sn shows after it was applied to an empty kernel.
var states = []struct {
	name string
	want []ravel.VirtualService
	then string
}{
	{"nothing", nil, ""},
	{"one", []ravel.VirtualService{vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1))}, `
-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 1
`},
	{"in roster order", []ravel.VirtualService{vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), rs("10.0.0.3", 63), rs("10.0.0.1", 1))}, `
-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.2:80 -g -w 2
-a -t 192.0.2.1:80 -r 10.0.0.3:80 -g -w 63
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 1
`},
	{"other weights", []ravel.VirtualService{vs("tcp 192.0.2.1:80", rs("10.0.0.2", 1), rs("10.0.0.3", 65535), rs("10.0.0.1", 7))}, `
-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.2:80 -g -w 1
-a -t 192.0.2.1:80 -r 10.0.0.3:80 -g -w 65535
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 7
`},
	{"one drained", []ravel.VirtualService{vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), drained("10.0.0.1", 3))}, `
-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.2:80 -g -w 2
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 0
`},
	{"drained from another weight", []ravel.VirtualService{vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), drained("10.0.0.1", 5))}, `
-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.2:80 -g -w 2
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 0
`},
	{"without a slot", []ravel.VirtualService{vs("tcp 192.0.2.1:80", drained("10.0.0.1", 0), rs("10.0.0.2", 2))}, `
-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 0
-a -t 192.0.2.1:80 -r 10.0.0.2:80 -g -w 2
`},
	{"all replaced", []ravel.VirtualService{vs("tcp 192.0.2.1:80", rs("10.0.0.9", 1))}, `
-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.9:80 -g -w 1
`},
	{"all drained", []ravel.VirtualService{vs("tcp 192.0.2.1:80", drained("10.0.0.1", 1))}, `
-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 0
`},
	{"no real server", []ravel.VirtualService{vs("tcp 192.0.2.1:80")}, `
-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
`},
	{"by tunnel", []ravel.VirtualService{vs("tcp 192.0.2.1:80", tunnelled(rs("10.0.0.2", 2)), tunnelled(drained("10.0.0.1", 3)))}, `
-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.2:80 -i -w 2
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -i -w 0
`},
	{"another scheduler", []ravel.VirtualService{scheduled(vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), drained("10.0.0.1", 3)), "wrr", 0)}, `
-A -t 192.0.2.1:80 -s wrr -b flag-3
-a -t 192.0.2.1:80 -r 10.0.0.2:80 -g -w 2
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 0
`},
	{"with thresholds", []ravel.VirtualService{
		limited(scheduled(vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), drained("10.0.0.1", 3)), "wlc", 0), 100, 80),
		limited(scheduled(vs("udp [2001:db8::1]:80", rs("2001:db8::a", 1)), "lc", 0), 70000, 0),
	}, `
-A -t 192.0.2.1:80 -s wlc -b flag-3
-a -t 192.0.2.1:80 -r 10.0.0.2:80 -g -w 2 -x 100 -y 80
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 0 -x 100 -y 80
-A -u [2001:db8::1]:80 -s lc -b flag-3
-a -u [2001:db8::1]:80 -r [2001:db8::a]:80 -g -w 1 -x 70000 -y 0
`},
	{"with other thresholds", []ravel.VirtualService{
		limited(scheduled(vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), rs("10.0.0.3", 3)), "wlc", 0), 67, 54),
		scheduled(vs("udp [2001:db8::1]:80", rs("2001:db8::a", 1)), "lc", 0),
	}, `
-A -t 192.0.2.1:80 -s wlc -b flag-3
-a -t 192.0.2.1:80 -r 10.0.0.2:80 -g -w 2 -x 67 -y 54
-a -t 192.0.2.1:80 -r 10.0.0.3:80 -g -w 3 -x 67 -y 54
-A -u [2001:db8::1]:80 -s lc -b flag-3
-a -u [2001:db8::1]:80 -r [2001:db8::a]:80 -g -w 1
`},
	{"other flags", []ravel.VirtualService{scheduled(vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)), ravel.MH, ravel.Flag3|ravel.HashPort)}, `
-A -t 192.0.2.1:80 -s mh -b mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 1
`},
	{"both protocols and families", []ravel.VirtualService{
		vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)),
		with(vs("udp 192.0.2.1:80", rs("10.0.0.1", 1)), func(v *ravel.VirtualService) { v.OnePacket = true }),
		scheduled(vs("udp 192.0.2.2:53", rs("10.0.0.1", 1)), "rr", 0),
		vs("tcp [2001:db8::1]:80", tunnelled(rs("2001:db8::b", 2)), rs("2001:db8::a", 1)),
		vs("udp [2001:db8::1]:80", rs("2001:db8::a", 1)),
	}, `
-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 1
-A -u 192.0.2.1:80 -s mh -o -b mh-fallback,mh-port,flag-3
-a -u 192.0.2.1:80 -r 10.0.0.1:80 -g -w 1
-A -u 192.0.2.2:53 -s rr -b flag-3
-a -u 192.0.2.2:53 -r 10.0.0.1:53 -g -w 1
-A -t [2001:db8::1]:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t [2001:db8::1]:80 -r [2001:db8::b]:80 -i -w 2
-a -t [2001:db8::1]:80 -r [2001:db8::a]:80 -g -w 1
-A -u [2001:db8::1]:80 -s mh -b mh-fallback,mh-port,flag-3
-a -u [2001:db8::1]:80 -r [2001:db8::a]:80 -g -w 1
`},
	{"some of those, changed", []ravel.VirtualService{
		vs("udp 192.0.2.1:80", rs("10.0.0.4", 1)),
		scheduled(vs("udp 192.0.2.2:53", rs("10.0.0.5", 2), rs("10.0.0.1", 1)), "lc", 0),
		vs("tcp [2001:db8::1]:80", drained("2001:db8::b", 2), tunnelled(rs("2001:db8::a", 4))),
	}, `
-A -u 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -u 192.0.2.1:80 -r 10.0.0.4:80 -g -w 1
-A -u 192.0.2.2:53 -s lc -b flag-3
-a -u 192.0.2.2:53 -r 10.0.0.5:53 -g -w 2
-a -u 192.0.2.2:53 -r 10.0.0.1:53 -g -w 1
-A -t [2001:db8::1]:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t [2001:db8::1]:80 -r [2001:db8::b]:80 -g -w 0
-a -t [2001:db8::1]:80 -r [2001:db8::a]:80 -i -w 4
`},
}

func TestStates(t *testing.T) {
	for _, s := range states {
		t.Run(s.name, func(t *testing.T) {
			kernels(t, func(t *testing.T, open func() (kernel, error)) {
				k := opened(t, open)
				d := start(t, Options{open: open})
				apply(t, d, s.want...)
				if diff := cmp.Diff(strings.TrimPrefix(s.then, "\n"), dump(t, k)); diff != "" {
					t.Fatalf("table (-want +got):\n%s", diff)
				}
				read, err := d.Read(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				var want []ravel.VirtualService
				for _, v := range s.want {
					v.Flags &^= ravel.Flag3
					if v.Scheduler != ravel.MH {
						// The kernel's is the one that they were added with.
						v.RealServers = slices.Clone(v.RealServers)
						for i, r := range v.RealServers {
							v.RealServers[i].LastWeight = r.Weight
						}
					}
					want = append(want, v)
				}
				if diff := cmp.Diff(want, read, equalAddrs); diff != "" {
					t.Errorf("read back (-want +got):\n%s", diff)
				}
			})
		})
	}
}

var equalAddrs = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func opened(t testing.TB, open func() (kernel, error)) kernel {
	t.Helper()
	k, err := open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

// foreigners puts services of others into a kernel and returns what they look like.
func foreigners(t testing.TB, k kernel) string {
	t.Helper()
	add := func(i id, flags uint32, reals ...real) {
		s := service{scheduler: "rr", flags: flags, netmask: 0xffffffff}
		if err := k.NewService(i.full(s)); err != nil {
			t.Fatal(err)
		}
		for _, r := range reals {
			if err := k.NewDestination(i.request(), r.destination()); err != nil {
				t.Fatal(err)
			}
		}
	}
	masquerade := real{at: addrPort("10.0.0.1", 8080), weight: 1}
	add(id{ServiceKey: key("tcp 192.0.2.1:443")}, 0, masquerade)
	add(id{ServiceKey: key("udp 192.0.2.9:53")}, 0x18)
	add(id{mark: 7}, 0x20, masquerade) // a mark is foreign whatever its flags are
	return dump(t, k)
}

// TestForeignServicesSurvive also has one that stands where one of ours should.
func TestForeignServicesSurvive(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k := opened(t, open)
		foreign := foreigners(t, k)
		d := start(t, Options{open: open})
		held, err := d.Apply(t.Context(), []ravel.VirtualService{vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)), vs("tcp 192.0.2.1:443", rs("10.0.0.1", 1))})
		if err != nil || !slices.Equal(held, []ravel.ServiceKey{key("tcp 192.0.2.1:80")}) {
			t.Fatalf("held %v, %v; want the one that is ours", held, err)
		}
		want := []ravel.Problem{{
			Where: "tcp 192.0.2.1:443", What: "IPVS has this service already and it is not ours; it is left as it is",
			Fix: "ipvsadm -D -t 192.0.2.1:443; or --adopt, to take over what the original Ravel left",
		}}
		if diff := cmp.Diff(want, d.Problems()); diff != "" {
			t.Errorf("problems (-want +got):\n%s", diff)
		}
		status, err := d.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var ours []string
		for _, s := range status {
			ours = append(ours, fmt.Sprintf("%s ours=%t", id{ServiceKey: s.Key(), mark: s.Mark}, s.Ours))
		}
		if diff := cmp.Diff([]string{
			"tcp 192.0.2.1:80 ours=true", "tcp 192.0.2.1:443 ours=false", "udp 192.0.2.9:53 ours=false", "mark 7 ours=false",
		}, ours); diff != "" {
			t.Errorf("status (-want +got):\n%s", diff)
		}

		// Once the foreign one is gone the next resync takes its place.
		if err := k.DelService(id{ServiceKey: key("tcp 192.0.2.1:443")}.request()); err != nil {
			t.Fatal(err)
		}
		d.Resync()
		apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)), vs("tcp 192.0.2.1:443", rs("10.0.0.1", 1)))

		would, err := d.Cleanup(t.Context(), true)
		if err != nil {
			t.Fatal(err)
		}
		lines := []string{"ipvsadm -D -t 192.0.2.1:80", "ipvsadm -D -t 192.0.2.1:443"}
		before := dump(t, k)
		if diff := cmp.Diff(lines, would); diff != "" {
			t.Errorf("dry run (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(before, dump(t, k)); diff != "" {
			t.Errorf("a dry run changed (-want +got):\n%s", diff)
		}
		did, err := d.Cleanup(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(lines, did); diff != "" {
			t.Errorf("cleanup (-want +got):\n%s", diff)
		}
		_, rest, _ := strings.Cut(foreign, "-A -u")
		if diff := cmp.Diff("-A -u"+rest, dump(t, k)); diff != "" {
			t.Errorf("after cleanup (-want +got):\n%s", diff)
		}
	})
}

// TestForeignTakesOurPlace has somebody replace a service of ours between two applies.
func TestForeignTakesOurPlace(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		for _, next := range [][]ravel.VirtualService{
			nil,
			{scheduled(vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)), "wlc", 0)},
		} {
			k := opened(t, open)
			d := start(t, Options{open: open})
			apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)))
			i := id{ServiceKey: key("tcp 192.0.2.1:80")}
			foreign := service{scheduler: "rr", netmask: 0xffffffff}
			if err := errors.Join(k.DelService(i.request()), k.NewService(i.full(foreign))); err != nil {
				t.Fatal(err)
			}
			held, err := d.Apply(t.Context(), next)
			if err != nil || len(held) > 0 {
				t.Errorf("held %v, %v; want nothing and no error", held, err)
			}
			if got, want := dump(t, k), "-A -t 192.0.2.1:80 -s rr\n"; got != want {
				t.Errorf("table:\n%swant:\n%s", got, want)
			}
			if err := k.DelService(i.request()); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// counting counts the requests that change something.
type counting struct {
	kernel
	n *int
}

func (c counting) NewService(s *ipvs.Service) error    { *c.n++; return c.kernel.NewService(s) }
func (c counting) UpdateService(s *ipvs.Service) error { *c.n++; return c.kernel.UpdateService(s) }
func (c counting) DelService(s *ipvs.Service) error    { *c.n++; return c.kernel.DelService(s) }
func (c counting) NewDestination(s *ipvs.Service, d *ipvs.Destination) error {
	*c.n++
	return c.kernel.NewDestination(s, d)
}
func (c counting) UpdateDestination(s *ipvs.Service, d *ipvs.Destination) error {
	*c.n++
	return c.kernel.UpdateDestination(s, d)
}
func (c counting) DelDestination(s *ipvs.Service, d *ipvs.Destination) error {
	*c.n++
	return c.kernel.DelDestination(s, d)
}

// seed returns RAVEL_SEED or a new one, and prints it.
func seed(t testing.TB) uint64 {
	t.Helper()
	n := uint64(time.Now().UnixNano())
	if s := os.Getenv("RAVEL_SEED"); s != "" {
		var err error
		if n, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("RAVEL_SEED=%d", n)
	return n
}

// lines sorts the real servers of each service that is not mh's: their order is history's.
func lines(s string) string {
	var services [][]string
	for l := range strings.Lines(strings.TrimPrefix(s, "\n")) {
		if strings.HasPrefix(l, "-A") {
			services = append(services, nil)
		}
		last := &services[len(services)-1]
		*last = append(*last, l)
	}
	for _, l := range services {
		if !strings.Contains(l[0], " -s mh ") {
			slices.Sort(l[1:])
		}
	}
	slices.SortFunc(services, func(a, b []string) int { return strings.Compare(a[0], b[0]) })
	return strings.Join(slices.Concat(services...), "")
}

// guard fails the test if new flows that are not held back meet what they must not after a change of the fake: a
// service that has no real server with a weight, or no scheduler, and has one before and after; or a real server of mh
// with a weight that has none before and after.
type guard struct {
	t             testing.TB
	fake          *fake
	before, after map[string]bool // services that take new flows
	out           map[string]bool // real servers that must take none
	held          map[string]int  // services
	holds         int             // how often any was held back
}

func newGuard(t testing.TB, f *fake) *guard {
	g := &guard{t: t, fake: f, held: map[string]int{}}
	f.changed = g.check
	return g
}

// hold is a HoldBack.
func (g *guard) hold(k ravel.ServiceKey) (func(), error) {
	name := nameOf(k)
	add := func(n int) {
		g.fake.mu.Lock()
		defer g.fake.mu.Unlock()
		g.held[name] += n
	}
	g.holds++
	add(1)
	return func() { add(-1) }, nil
}

func nameOf(k ravel.ServiceKey) string {
	return (&fakeService{Service: *id{ServiceKey: k}.request()}).name()
}

// expect takes note of the kernel as it is and of what it shall be.
func (g *guard) expect(want []ravel.VirtualService) {
	g.fake.mu.Lock()
	defer g.fake.mu.Unlock()
	g.before, g.after, g.out = g.serving(), map[string]bool{}, map[string]bool{}
	weighted := map[string]bool{}
	for _, s := range g.fake.services {
		for _, r := range s.reals {
			weighted[s.name()+" "+r.Address.String()] = r.Weight > 0
		}
	}
	for _, v := range want {
		g.after[nameOf(v.Key)] = v.TakesNewFlows()
		for _, r := range v.RealServers {
			if at := nameOf(v.Key) + " " + r.Addr.String(); r.Weight == 0 && !weighted[at] {
				g.out[at] = true
			}
		}
	}
}

func (g *guard) serving() map[string]bool {
	serving := map[string]bool{}
	for _, s := range g.fake.services {
		serving[s.name()] = s.SchedName != none && slices.ContainsFunc(s.reals, func(r *fakeReal) bool { return r.Weight > 0 })
	}
	return serving
}

func (g *guard) check() {
	now := g.serving()
	for name, was := range g.before {
		if was && g.after[name] && !now[name] && g.held[name] == 0 {
			g.t.Errorf("%s takes no new flows after: %s", name, strings.Join(g.fake.changes, "; "))
		}
	}
	for _, s := range g.fake.services {
		for _, r := range s.reals {
			if s.SchedName != none && g.held[s.name()] == 0 && r.Weight > 0 && g.out[s.name()+" "+r.Address.String()] {
				g.t.Errorf("%s of %s takes new flows after: %s", r.Address, s.name(), strings.Join(g.fake.changes, "; "))
			}
		}
	}
}

// lasts fails the test if a real server's last weight is not the wanted one.
func lasts(t testing.TB, f *fake, want []ravel.VirtualService) {
	t.Helper()
	for _, v := range want {
		if v.Scheduler != ravel.MH {
			continue
		}
		have := f.find(id{ServiceKey: v.Key}.request())
		for _, r := range v.RealServers {
			at := have.find(real{at: addrPort(r.Addr.String(), v.Key.Port)}.destination())
			if have.reals[at].last != r.LastWeight {
				t.Errorf("%s of %s has last weight %d, want %d: %s", r.Addr, v.Key, have.reals[at].last, r.LastWeight, strings.Join(f.changes, "; "))
			}
		}
	}
}

// TestAnyStateLeadsToAnyOther also has each request of the way fail once.
func TestAnyStateLeadsToAnyOther(t *testing.T) {
	for _, from := range states {
		for _, to := range states {
			failed := true
			for n := 0; failed; n++ {
				f := &fake{}
				g := newGuard(t, f)
				d := start(t, Options{open: f.handle, HoldBack: g.hold})
				apply(t, d, from.want...)
				g.expect(to.want)
				f.changes = nil
				if n > 0 {
					f.failAt = f.calls + n
				}
				held, err := d.Apply(t.Context(), to.want)
				failed = n == 0 || f.calls >= f.failAt && f.failAt > 0
				switch {
				case n == 0 || !failed:
					if err != nil || len(held) != len(to.want) {
						t.Errorf("%s to %s: held %d of %d, %v", from.name, to.name, len(held), len(to.want), err)
					}
				case err == nil: // it was asked for once more
					k, _ := f.handle()
					if diff := cmp.Diff(lines(to.then), lines(dump(t, k))); diff != "" {
						t.Errorf("%s to %s, request %d failed without an error (-want +got):\n%s", from.name, to.name, n, diff)
					}
				case !errors.Is(err, unix.EIO):
					t.Errorf("%s to %s: %v, want EIO", from.name, to.name, err)
				case !errors.Is(err, ErrUnknown) && !slices.Equal(held, served(f, to.want)):
					t.Errorf("%s to %s, request %d failed: held %v, the kernel serves %v", from.name, to.name, n, held, served(f, to.want))
				}
				g.expect(to.want)
				f.failAt = 0
				apply(t, d, to.want...)
				k, _ := f.handle()
				if diff := cmp.Diff(lines(to.then), lines(dump(t, k))); diff != "" {
					t.Errorf("%s to %s, request %d failed (-want +got):\n%s", from.name, to.name, n, diff)
				}
				lasts(t, f, to.want)
				if t.Failed() {
					t.FailNow()
				}
				d.Close()
			}
		}
	}
}

// TestWalk goes from state to state with restarts, failures, meddling and foreign services.
func TestWalk(t *testing.T) {
	t.Run("fake", func(t *testing.T) {
		f := &fake{}
		walk(t, f.handle, f, stepsOf(3000))
	})
	t.Run("real", func(t *testing.T) {
		nettest.Need(t, nettest.IPVS)
		flush(t)
		walk(t, open, nil, 150)
	})
}

// stepsOf is how many steps a walk on the fake has: a tenth where it is there only because the kernel's is.
func stepsOf(n int) int {
	if nettest.Has(nettest.PlainClock) {
		return n
	}
	return n / 10
}

func walk(t *testing.T, open func() (kernel, error), f *fake, steps int) {
	random := rand.New(rand.NewPCG(seed(t), 0))
	k := opened(t, open)
	foreign := foreigners(t, k)
	var g *guard
	var hold func(ravel.ServiceKey) (func(), error)
	if f != nil {
		g = newGuard(t, f)
		hold = g.hold
	}
	var changes int
	counted := func() (kernel, error) {
		k, err := open()
		return counting{k, &changes}, err
	}
	d := start(t, Options{open: counted, HoldBack: hold})
	for range steps {
		s := states[random.IntN(len(states))]
		if g != nil {
			g.before, g.out = nil, nil // no promise while others meddle
		}
		switch random.IntN(7) {
		case 0:
			d.Close()
			d = start(t, Options{open: counted, HoldBack: hold})
		case 1:
			meddle(t, k, random)
			d.Resync()
		case 2:
			meddle(t, k, random) // and nobody says so
			d.Apply(t.Context(), s.want)
			d.Resync()
		case 3:
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(random.IntN(3000))*time.Microsecond)
			d.Apply(ctx, s.want)
			cancel()
			// What it began ends before this one begins.
			if _, err := d.Status(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if g != nil {
			f.changes = nil
			g.expect(s.want)
			if random.IntN(3) == 0 {
				f.failAt = f.calls + 1 + random.IntN(20)
				held, err := d.Apply(t.Context(), s.want)
				f.failAt = 0
				g.expect(s.want)
				if !errors.Is(err, ErrUnknown) && !slices.Equal(held, served(f, s.want)) {
					t.Fatalf("%s, a request failed: held %v, the kernel serves %v", s.name, held, served(f, s.want))
				}
			}
		}
		apply(t, d, s.want...)
		if diff := cmp.Diff(lines(s.then+foreign), lines(dump(t, k))); diff != "" {
			t.Fatalf("%s (-want +got):\n%s", s.name, diff)
		}
		before := changes
		apply(t, d, s.want...)
		d.Resync()
		apply(t, d, s.want...)
		if changes != before {
			t.Fatalf("%s: %d changes when applied again", s.name, changes-before)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
}

// meddle does to the kernel what a person with ipvsadm may do to services of ours.
func meddle(t *testing.T, k kernel, random *rand.Rand) {
	t.Helper()
	services, order, err := readServices(k)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range order {
		if !isOurs(services[i]) || random.IntN(2) == 0 {
			continue
		}
		_, reals, err := readReals(k, i)
		if err == nil {
			switch n := random.IntN(5); {
			case n == 0:
				err = k.DelService(i.request())
			case n == 1:
				s := *serviceOf(services[i])
				s.scheduler = "rr"
				s.flags = flagOurs | 1
				s.timeout = 300
				err = k.UpdateService(i.full(s))
			case n == 2 && len(reals) > 0:
				err = k.DelDestination(i.request(), reals[0])
			case n == 3 && len(reals) > 0:
				reals[0].Weight, reals[0].UpperThreshold = 9, 100
				err = k.UpdateDestination(i.request(), reals[0])
			case n == 4:
				other := real{at: addrPort("10.0.0.77", 99), weight: 1}
				if i.VIP.Is6() {
					other.at = addrPort("2001:db8::77", 99)
				}
				err = k.NewDestination(i.request(), other.destination())
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
