package director

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/ipvs"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// history is the life of one service's roster: real servers join with no slot, become active, drain and go.
type history struct {
	random *rand.Rand
	births uint64
	roster ravel.Roster
	addrs  []netip.Addr
}

// next has something happen to the roster: mostly what a fleet does, at times what two histories that meet do.
func (h *history) next() {
	at := h.random.IntN(len(h.addrs))
	addr := h.addrs[at]
	i := slices.IndexFunc(h.roster, func(e ravel.RosterEntry) bool { return e.Addr == addr })
	switch {
	case i < 0:
		h.births++
		h.roster = append(h.roster, ravel.RosterEntry{Addr: addr, Birth: h.births})
	case h.random.IntN(6) == 0: // another history's stamp is the higher one
		h.roster[i].Birth = h.random.Uint64N(h.births + 2)
	default:
		e := &h.roster[i]
		switch e.State {
		case ravel.Joining:
			e.State, e.Weight = ravel.Active, 1+h.random.IntN(63)
		case ravel.Active:
			if e.Weight = 1 + h.random.IntN(63); h.random.IntN(2) == 0 {
				e.State = ravel.Draining
			}
		case ravel.Draining:
			switch h.random.IntN(4) {
			case 0:
				e.State = ravel.Active
			case 1: // it went and came back, and this director missed that
				e.State, e.Weight = ravel.Joining, 0
			default:
				h.roster = slices.Delete(h.roster, i, i+1)
			}
		}
	}
	slices.SortFunc(h.roster, ravel.RosterEntry.Compare)
}

// service is the roster as a director applies it; some of the active ones may be dead.
func (h *history) service(k string) ravel.VirtualService {
	v := vs(k)
	for _, e := range h.roster {
		r := ravel.RealServer{Addr: e.Addr, LastWeight: e.Weight, Forwarding: ravel.Direct}
		if e.State == ravel.Active && h.random.IntN(8) > 0 {
			r.Weight = e.Weight
		}
		v.RealServers = append(v.RealServers, r)
	}
	return v
}

// TestRosters walks through random histories of rosters, with restarts and failures in between: the kernel's list is
// always the roster.
func TestRosters(t *testing.T) {
	t.Run("fake", func(t *testing.T) {
		f := &fake{}
		rosters(t, f.handle, f, stepsOf(1000))
	})
	t.Run("real", func(t *testing.T) {
		nettest.Need(t, nettest.IPVS)
		flush(t)
		rosters(t, open, nil, 120)
	})
}

func rosters(t *testing.T, open func() (kernel, error), f *fake, steps int) {
	random := rand.New(rand.NewPCG(seed(t), 1))
	keys := []string{"tcp 192.0.2.1:80", "udp 192.0.2.1:53", "tcp [2001:db8::1]:80", "tcp 192.0.2.2:80"}
	var histories []*history
	for _, k := range keys {
		h := &history{random: random}
		for n := range 8 {
			addr := fmt.Sprintf("10.0.0.%d", n+1)
			if strings.Contains(k, "[") {
				addr = fmt.Sprintf("2001:db8::%x", n+10)
			}
			h.addrs = append(h.addrs, netip.MustParseAddr(addr))
		}
		histories = append(histories, h)
	}
	o := Options{open: open}
	var g *guard
	if f != nil {
		g = newGuard(t, f)
		o.HoldBack = g.hold
	}
	k := opened(t, open)
	d := start(t, o)
	for range steps {
		restarted := random.IntN(10) == 0
		if restarted {
			d.Close()
			d = start(t, o)
		}
		var want []ravel.VirtualService
		for n, h := range histories {
			for range random.IntN(4) {
				h.next()
			}
			want = append(want, h.service(keys[n]))
		}
		if g != nil {
			f.changes = nil
			g.expect(want)
			if random.IntN(5) == 0 {
				f.failAt = f.calls + 1 + random.IntN(30)
				if _, err := d.Apply(t.Context(), want); err != nil {
					g.before, g.out = nil, nil // it is half done
				}
				f.failAt = 0
			}
		}
		if f != nil && random.IntN(8) == 0 {
			g.before, g.out = nil, nil
			f.changed = func() { // somebody has a hand in the middle of it
				if s := f.services[random.IntN(len(f.services))]; len(s.reals) > 0 && random.IntN(3) == 0 {
					at := random.IntN(len(s.reals))
					s.reals = slices.Delete(s.reals, at, at+1)
					f.changed = g.check
				}
			}
			_, _ = d.Apply(t.Context(), want)
			f.changed = g.check
			d.Resync()
		}
		apply(t, d, want...)
		if diff := cmp.Diff(shown(want), dump(t, k)); diff != "" {
			t.Fatalf("table (-want +got):\n%s", diff)
		}
		if f != nil {
			lasts(t, f, want)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	if g != nil && g.holds > 2*steps {
		t.Errorf("new flows were held back %d times in %d steps", g.holds, steps)
	}
}

// shown is what ipvsadm -Sn would show of services, in the order of the lists.
func shown(want []ravel.VirtualService) string {
	var b strings.Builder
	list := slices.SortedFunc(slices.Values(want), func(a, b ravel.VirtualService) int { return a.Key.Compare(b.Key) })
	for _, v := range list {
		fmt.Fprintf(&b, "-A %s -s mh -b mh-fallback,mh-port,flag-3\n", option(id{ServiceKey: v.Key}))
		for _, r := range v.RealServers {
			fmt.Fprintf(&b, "-a %s -r %s -g -w %d\n", option(id{ServiceKey: v.Key}), netip.AddrPortFrom(r.Addr, v.Key.Port), r.Weight)
		}
	}
	return b.String()
}

// TestOnlyTheOutOfOrderAreAddedAgain follows one service from list to list in requests.
func TestOnlyTheOutOfOrderAreAddedAgain(t *testing.T) {
	f := &fake{}
	d := start(t, Options{open: f.handle, HoldBack: noting(f, nil)})
	one, two, three := rs("10.0.0.1", 1), rs("10.0.0.2", 2), rs("10.0.0.3", 3)
	const of = " of 6 192.0.2.1:80, weight "
	for _, step := range []struct {
		name  string
		reals []ravel.RealServer
		want  []string
	}{
		{"new", []ravel.RealServer{two, one}, []string{
			"add 6 192.0.2.1:80 none", "add 10.0.0.1 to 6 192.0.2.1:80, weight 1", "add 10.0.0.2 to 6 192.0.2.1:80, weight 2", "set 6 192.0.2.1:80 mh",
		}},
		{"a newcomer", []ravel.RealServer{drained("10.0.0.3", 0), two, one}, []string{"add 10.0.0.3 to 6 192.0.2.1:80, weight 0"}},
		{"which rises", []ravel.RealServer{three, two, one}, []string{"set 10.0.0.3" + of + "3"}},
		{"one is out of order", []ravel.RealServer{two, three, one}, []string{
			"delete 10.0.0.2 from 6 192.0.2.1:80", "add 10.0.0.2 to 6 192.0.2.1:80, weight 2",
		}},
		{"one that drains, later", []ravel.RealServer{drained("10.0.0.3", 3), two, one}, []string{
			"delete 10.0.0.3 from 6 192.0.2.1:80", "add 10.0.0.3 to 6 192.0.2.1:80, weight 3", "set 10.0.0.3" + of + "0",
		}},
		{"and again", []ravel.RealServer{two, drained("10.0.0.3", 3), one}, []string{
			"delete 10.0.0.2 from 6 192.0.2.1:80", "add 10.0.0.2 to 6 192.0.2.1:80, weight 2",
		}},
		{"one with weight 0", []ravel.RealServer{drained("10.0.0.3", 3), two, one}, []string{
			"hold back tcp 192.0.2.1:80", "delete 10.0.0.3 from 6 192.0.2.1:80", "add 10.0.0.3 to 6 192.0.2.1:80, weight 3",
			"set 10.0.0.3" + of + "0", "release tcp 192.0.2.1:80",
		}},
		{"another last weight", []ravel.RealServer{drained("10.0.0.3", 7), two, one}, []string{
			"hold back tcp 192.0.2.1:80", "set 10.0.0.3" + of + "7", "set 10.0.0.3" + of + "0", "release tcp 192.0.2.1:80",
		}},
		{"no slot", []ravel.RealServer{drained("10.0.0.3", 0), two, one}, []string{
			"delete 10.0.0.3 from 6 192.0.2.1:80", "add 10.0.0.3 to 6 192.0.2.1:80, weight 0",
		}},
		{"two left", []ravel.RealServer{drained("10.0.0.3", 0), one}, []string{"delete 10.0.0.2 from 6 192.0.2.1:80"}},
		{"the only one that takes new flows", []ravel.RealServer{one, drained("10.0.0.3", 0)}, []string{
			"hold back tcp 192.0.2.1:80", "delete 10.0.0.1 from 6 192.0.2.1:80", "add 10.0.0.1 to 6 192.0.2.1:80, weight 1", "release tcp 192.0.2.1:80",
		}},
		{"it with one that comes", []ravel.RealServer{two, drained("10.0.0.3", 0), one}, []string{
			"delete 10.0.0.3 from 6 192.0.2.1:80", "add 10.0.0.3 to 6 192.0.2.1:80, weight 0", "add 10.0.0.2 to 6 192.0.2.1:80, weight 2",
		}},
		{"alone", []ravel.RealServer{one}, []string{"delete 10.0.0.2 from 6 192.0.2.1:80", "delete 10.0.0.3 from 6 192.0.2.1:80"}},
		{"somebody bridges", []ravel.RealServer{two, one, drained("10.0.0.3", 0)}, []string{
			"add 10.0.0.2 to 6 192.0.2.1:80, weight 2", "add 10.0.0.3 to 6 192.0.2.1:80, weight 0",
			"delete 10.0.0.1 from 6 192.0.2.1:80", "add 10.0.0.1 to 6 192.0.2.1:80, weight 1",
			"delete 10.0.0.2 from 6 192.0.2.1:80", "add 10.0.0.2 to 6 192.0.2.1:80, weight 2",
		}},
	} {
		f.changes = nil
		apply(t, d, vs("tcp 192.0.2.1:80", step.reals...))
		if diff := cmp.Diff(step.want, f.changes); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step.name, diff)
		}
	}

	// Other schedulers do not read the order.
	v := scheduled(vs("tcp 192.0.2.1:80", two, one, three), "wrr", 0)
	apply(t, d, v)
	f.changes = nil
	apply(t, d, scheduled(vs("tcp 192.0.2.1:80", three, two, drained("10.0.0.1", 9)), "wrr", 0))
	if diff := cmp.Diff([]string{"set 10.0.0.1" + of + "0"}, f.changes); diff != "" {
		t.Errorf("wrr (-want +got):\n%s", diff)
	}
}

// TestLastWeightsAreGivenOnce restarts the process: what the kernel does not tell is said once more.
func TestLastWeightsAreGivenOnce(t *testing.T) {
	f := &fake{}
	want := []ravel.VirtualService{
		vs("tcp 192.0.2.1:80", drained("10.0.0.3", 0), rs("10.0.0.2", 2), drained("10.0.0.1", 3)),
		vs("tcp 192.0.2.2:80", rs("10.0.0.2", 2)),
	}
	apply(t, start(t, Options{open: f.handle}), want...)
	f.services[0].reals[2].last = 9 // of another history
	d := start(t, Options{open: f.handle, HoldBack: noting(f, errors.New("no iptables"))})
	f.changes = nil
	apply(t, d, want...)
	if diff := cmp.Diff([]string{
		"delete 10.0.0.3 from 6 192.0.2.1:80", "add 10.0.0.3 to 6 192.0.2.1:80, weight 0",
		"hold back tcp 192.0.2.1:80", "set 10.0.0.1 of 6 192.0.2.1:80, weight 3", "set 10.0.0.1 of 6 192.0.2.1:80, weight 0",
		"release tcp 192.0.2.1:80",
	}, f.changes); diff != "" {
		t.Errorf("after a restart (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]ravel.Problem{{
		Where: "tcp 192.0.2.1:80", What: "new flows could not be held back while the slots of its real servers changed: no iptables",
	}}, d.Problems()); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	f.changes = nil
	apply(t, d, want...)
	d.Resync()
	apply(t, d, want...)
	if len(f.changes) > 0 || len(d.Problems()) > 0 {
		t.Errorf("and once more: %q, problems %v", f.changes, d.Problems())
	}
}

// TestRefusedIsNoReasonToAddOthersAgain has the kernel refuse an old one.
func TestRefusedIsNoReasonToAddOthersAgain(t *testing.T) {
	f := &fake{}
	d := start(t, Options{open: f.handle})
	apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.2", 1), rs("10.0.0.1", 1)))
	for n := range 3 {
		f.changes = nil
		_, err := d.Apply(t.Context(), []ravel.VirtualService{vs("tcp 192.0.2.1:80", rs("10.0.0.2", 5), rs("10.0.0.1", 1), rs("224.0.0.1", 1))})
		if err == nil {
			t.Fatal("it is not refused")
		}
		var want []string
		if n == 0 {
			want = []string{"set 10.0.0.2 of 6 192.0.2.1:80, weight 5"}
		}
		if diff := cmp.Diff(want, f.changes); diff != "" {
			t.Errorf("pass %d (-want +got):\n%s", n, diff)
		}
	}
}

// TestDigests reads back what was done, and only that.
func TestDigests(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k := opened(t, open)
		reads := 0
		d := start(t, Options{open: func() (kernel, error) {
			k, err := open()
			return reading{k, &reads}, err
		}})
		web := vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), drained("10.0.0.1", 3), drained("10.0.0.3", 0))
		six := vs("udp [2001:db8::1]:53", rs("2001:db8::2", 2))
		other := scheduled(vs("tcp 192.0.2.3:80", rs("10.0.0.2", 2)), "wrr", 0)
		check := func(when string, read int, want ...ravel.VirtualService) {
			t.Helper()
			reads = 0
			services, uses, err := d.Digests(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if reads != read {
				t.Errorf("%s: %d reads, want %d", when, reads, read)
			}
			expect := map[ravel.ServiceKey]ravel.ServiceReport{}
			using := map[netip.Addr][]ravel.ServiceKey{}
			slices.SortFunc(want, func(a, b ravel.VirtualService) int { return a.Key.Compare(b.Key) })
			for _, v := range want {
				var r ravel.ServiceReport
				if r.Table, r.Available = maglev.Digest(maglev.DefaultSize, v); v.Scheduler != ravel.MH {
					r.Table = 0
				}
				expect[v.Key] = r
				for _, rs := range v.RealServers {
					using[rs.Addr] = append(using[rs.Addr], v.Key)
				}
			}
			if diff := cmp.Diff(expect, services, equalAddrs); diff != "" {
				t.Errorf("%s: digests (-want +got):\n%s", when, diff)
			}
			if diff := cmp.Diff(using, uses, equalAddrs); diff != "" {
				t.Errorf("%s: uses (-want +got):\n%s", when, diff)
			}
		}
		d.SetTableSize(int(maglev.DefaultSize))
		check("before any apply", 1)
		apply(t, d, web, six, other)
		check("new", 6, web, six, other)
		check("again", 0, web, six, other)

		before, uses, _ := d.Digests(t.Context())
		was := before[web.Key]
		web = with(web, func(v *ravel.VirtualService) { v.RealServers = []ravel.RealServer{rs("10.0.0.4", 1), v.RealServers[0]} })
		apply(t, d, web, six, other)
		check("one changed", 2, web, six, other)
		if before[web.Key] != was || len(uses) != 4 {
			t.Error("what was returned changed")
		}
		apply(t, d, six, web)
		check("one removed", 0, six, web)
		d.Resync()
		apply(t, d, six, web)
		check("after a resync", 0, six, web)

		// Somebody meddles with one that we edit.
		i := id{ServiceKey: web.Key}
		if err := k.DelDestination(i.request(), real{at: addrPort("10.0.0.2", 80)}.destination()); err != nil {
			t.Fatal(err)
		}
		web = with(web, func(v *ravel.VirtualService) {
			v.RealServers = slices.Clone(v.RealServers)
			v.RealServers[0].Weight, v.RealServers[0].LastWeight = 5, 5
		})
		apply(t, d, six, web)
		check("meddled with", 2, six, with(web, func(v *ravel.VirtualService) { v.RealServers = v.RealServers[:1] }))
		apply(t, d, six, web)
		check("mended", 2, six, web)

		// What a process finds at weight 0 has no known last weight until it was given.
		web = with(web, func(v *ravel.VirtualService) {
			v.RealServers = slices.Clone(v.RealServers)
			v.RealServers[0].Weight = 0
		})
		apply(t, d, six, web)
		check("drained", 2, six, web)
		d.Close()
		d = start(t, Options{open: open})
		services, _, err := d.Digests(t.Context())
		if err != nil || len(services) != 2 || services[web.Key].Table != 0 || services[six.Key].Table != 0 || services[web.Key].Available == 0 {
			t.Errorf("without a size: %v, %v", services, err)
		}
		d.SetTableSize(251)
		services, _, err = d.Digests(t.Context())
		if table, _ := maglev.Digest(251, six); err != nil || services[web.Key].Table != 0 || services[six.Key].Table != table {
			t.Errorf("found at start: %v, %v", services, err)
		}
		apply(t, d, six, web)
		services, _, err = d.Digests(t.Context())
		if table, _ := maglev.Digest(251, web); err != nil || services[web.Key].Table != table {
			t.Errorf("given once more: %v, %v", services, err)
		}
	})
}

// reading counts what is read of single services, and of all.
type reading struct {
	kernel
	n *int
}

func (r reading) GetServices() ([]*ipvs.Service, error) { *r.n++; return r.kernel.GetServices() }
func (r reading) GetService(s *ipvs.Service) (*ipvs.Service, error) {
	*r.n++
	return r.kernel.GetService(s)
}
func (r reading) GetDestinations(s *ipvs.Service) ([]*ipvs.Destination, error) {
	*r.n++
	return r.kernel.GetDestinations(s)
}
