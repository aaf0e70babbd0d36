package ifaddr

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/sysctl"
)

// fakeSysctls is a /proc/sys with the settings that Links makes.
func fakeSysctls(t *testing.T) (root string, s *sysctl.Setter) {
	root = t.TempDir()
	dir := filepath.Join(root, "net/ipv4/conf/all")
	must(t, os.MkdirAll(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "arp_ignore"), []byte("0\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "arp_announce"), []byte("0\n"), 0o644))
	return root, sysctl.New(root, "")
}

// newLinks returns Links over the kernel, with a clock that only the test moves.
func newLinks(t *testing.T, k kernel) (*Links, *time.Time) {
	_, s := fakeSysctls(t)
	l := New(Options{Sysctl: s})
	t.Cleanup(func() { must(t, l.Close()) })
	clock := time.Unix(1e9, 0)
	l.kernel, l.now = k, func() time.Time { return clock }
	return l, &clock
}

// addrs makes VIPs of words.
func addrs(words string) []ravel.Addr {
	var list []ravel.Addr
	for _, w := range strings.Fields(words) {
		list = append(list, ravel.Addr{VIP: netip.MustParseAddr(w)})
	}
	return list
}

func text[T fmt.Stringer](list []T) string {
	out := make([]string, len(list))
	for i, a := range list {
		out[i] = a.String()
	}
	return strings.Join(out, " ")
}

func TestApplySendsOnlyTheDifference(t *testing.T) {
	k := newFake()
	k.foreign("eth0", "veth", netip.MustParseAddr("198.51.100.1"))
	l, clock := newLinks(t, k)
	for _, step := range []struct {
		want, ip string
		wait     time.Duration
	}{
		{want: "", ip: ""},
		{want: "192.0.2.1 2001:db8::1", ip: "link add ravel0; addr add 192.0.2.1; addr add 2001:db8::1"},
		{want: "192.0.2.1 2001:db8::1", ip: ""},
		{want: "192.0.2.1 192.0.2.2", ip: "addr add 192.0.2.2; route add blackhole 2001:db8::1; addr del 2001:db8::1"},
		{want: "192.0.2.1 192.0.2.2", ip: "", wait: 59 * time.Second},
		{want: "192.0.2.1 192.0.2.2", ip: "route del blackhole 2001:db8::1", wait: time.Second},
		{want: "", ip: "route add blackhole 192.0.2.1; addr del 192.0.2.1; route add blackhole 192.0.2.2; addr del 192.0.2.2"},
		{want: "192.0.2.2", ip: "addr add 192.0.2.2; route del blackhole 192.0.2.2"},
		{want: "192.0.2.2", ip: "route del blackhole 192.0.2.1", wait: time.Minute},
	} {
		*clock = clock.Add(step.wait)
		k.log, k.calls = nil, 0
		held, err := l.Apply(t.Context(), addrs(step.want))
		must(t, err)
		if got := text(held); got != step.want {
			t.Fatalf("held %q, want %q", got, step.want)
		}
		if diff := cmp.Diff(step.ip, strings.Join(k.log, "; ")); diff != "" {
			t.Fatalf("to %q: changes (-want +got):\n%s", step.want, diff)
		}
		if step.ip == "" && step.want != "" && k.calls != 0 {
			t.Fatalf("to %q: nothing to do took %d calls", step.want, k.calls)
		}
	}
	if !k.links["eth0"].addrs[netip.MustParseAddr("198.51.100.1")] {
		t.Fatal("the address of another link is gone")
	}
}

func TestNextExpiry(t *testing.T) {
	k := newFake()
	l, clock := newLinks(t, k)
	apply := func(want string) {
		t.Helper()
		_, err := l.Apply(t.Context(), addrs(want))
		must(t, err)
	}
	apply("192.0.2.1 192.0.2.2")
	if at, due := l.NextExpiry(); due {
		t.Fatalf("nothing was removed, and something goes at %s", at)
	}
	apply("192.0.2.2")
	first := clock.Add(time.Minute)
	*clock = clock.Add(10 * time.Second)
	apply("")
	if at, due := l.NextExpiry(); !due || !at.Equal(first) {
		t.Fatalf("next at %s, %v; want %s", at, due, first)
	}
	*clock = first.Add(5 * time.Second)
	if at, _ := l.NextExpiry(); !at.Equal(first) {
		t.Fatalf("next at %s; want %s, though it is past", at, first)
	}
	apply("")
	if at, due := l.NextExpiry(); !due || !at.Equal(first.Add(10*time.Second)) {
		t.Fatalf("next at %s, %v; want %s", at, due, first.Add(10*time.Second))
	}
	// A route that cannot be removed is no reason to be called all the time.
	*clock = clock.Add(time.Hour)
	k.failAt = 1
	if _, err := l.Apply(t.Context(), nil); !errors.Is(err, errInjected) {
		t.Fatalf("got %v", err)
	}
	if at, due := l.NextExpiry(); !due || !at.Equal(clock.Add(time.Second)) {
		t.Fatalf("next at %s, %v; want a second from now, %s", at, due, clock.Add(time.Second))
	}
}

func TestRestart(t *testing.T) {
	k := newFake()
	l, _ := newLinks(t, k)
	_, err := l.Apply(t.Context(), addrs("192.0.2.1 192.0.2.2 192.0.2.3"))
	must(t, err)
	_, err = l.Apply(t.Context(), addrs("192.0.2.1 192.0.2.2"))
	must(t, err)
	again, clock := newLinks(t, k)
	k.log = nil
	held, err := again.Apply(t.Context(), addrs("192.0.2.1"))
	must(t, err)
	if got := text(held); got != "192.0.2.1" {
		t.Fatalf("held %q", got)
	}
	if got := strings.Join(k.log, "; "); got != "route add blackhole 192.0.2.2; addr del 192.0.2.2" {
		t.Fatalf("changes: %s", got)
	}
	if at, due := again.NextExpiry(); !due || !at.Equal(clock.Add(time.Minute)) {
		t.Fatalf("the blackhole that was found goes at %s, want a minute from now, %s", at, clock.Add(time.Minute))
	}
}

func TestForeignLinkIsNeverTouched(t *testing.T) {
	inUse := netip.MustParseAddr("203.0.113.9")
	for _, kind := range []string{"veth", "dummy"} {
		k := newFake()
		k.foreign("ravel0", kind, inUse)
		l, _ := newLinks(t, k)
		if _, err := l.Apply(t.Context(), nil); err != nil {
			t.Fatalf("nothing is wanted, and: %v", err)
		}
		for range 2 {
			held, err := l.Apply(t.Context(), addrs("192.0.2.1"))
			if !errors.Is(err, ErrForeign) || len(held) != 0 {
				t.Fatalf("on a foreign %s: held %v, %v", kind, held, err)
			}
			if p := l.Problems(); len(p) != 1 || p[0].Where != "link ravel0" {
				t.Fatalf("problems: %v", p)
			}
		}
		did, err := l.Cleanup(t.Context(), false)
		must(t, err)
		if len(did) != 0 || len(k.log) != 0 || !maps.Equal(k.links["ravel0"].addrs, map[netip.Addr]bool{inUse: true}) {
			t.Fatalf("touched: %q %q %v", did, k.log, k.links["ravel0"].addrs)
		}
		delete(k.links, "ravel0")
		_, err = l.Apply(t.Context(), addrs("192.0.2.1"))
		must(t, err)
		if p := l.Problems(); len(p) != 0 {
			t.Fatalf("problems that are over: %v", p)
		}
	}
}

func TestVIPOnAnotherLink(t *testing.T) {
	k := newFake()
	k.foreign("eth0", "veth", netip.MustParseAddr("192.0.2.1"))
	l, _ := newLinks(t, k)
	held, err := l.Apply(t.Context(), addrs("192.0.2.1 192.0.2.2"))
	must(t, err)
	if text(held) != "192.0.2.1 192.0.2.2" {
		t.Fatalf("held %v", held)
	}
	want := []ravel.Problem{{
		Where: "VIP 192.0.2.1",
		What:  "link eth0 holds it too, so that this host answers ARP or solicitations for it there",
		Fix:   "ip addr del 192.0.2.1/32 dev eth0",
	}}
	if diff := cmp.Diff(want, l.Problems()); diff != "" {
		t.Fatalf("problems (-want +got):\n%s", diff)
	}
	_, err = l.Apply(t.Context(), addrs("192.0.2.2"))
	must(t, err)
	if p := l.Problems(); len(p) != 0 {
		t.Fatalf("problems that are over: %v", p)
	}
	if !k.links["eth0"].addrs[netip.MustParseAddr("192.0.2.1")] {
		t.Fatal("the address of another link is gone")
	}
}

func TestResyncMendsAndCountsDrift(t *testing.T) {
	k := newFake()
	_, s := fakeSysctls(t)
	r := prometheus.NewPedanticRegistry()
	l := New(Options{Sysctl: s, Registerer: r})
	t.Cleanup(func() { must(t, l.Close()) })
	l.kernel = k
	vips := addrs("192.0.2.1 192.0.2.2")
	_, err := l.Apply(t.Context(), vips)
	must(t, err)
	delete(k.links["ravel0"].addrs, vips[0].VIP)
	k.links["ravel0"].addrs[netip.MustParseAddr("203.0.113.7")] = true
	l.Resync()
	held, err := l.Apply(t.Context(), vips)
	must(t, err)
	if got := text(held); got != "192.0.2.1 192.0.2.2" || len(k.links["ravel0"].addrs) != 2 {
		t.Fatalf("held %q, the link %v", got, k.links["ravel0"].addrs)
	}
	delete(k.links, "ravel0")
	// Also without Resync: the kernel says that the link is gone when something is to be added.
	held, err = l.Apply(t.Context(), append(slices.Clone(vips), addrs("192.0.2.3")...))
	must(t, err)
	if got := text(held); got != "192.0.2.1 192.0.2.2 192.0.2.3" || len(k.links["ravel0"].addrs) != 3 {
		t.Fatalf("held %q, the link %v", got, k.links["ravel0"].addrs)
	}
	want := `
		# HELP ravel_vips VIPs that this host should hold (desired) and that its link holds (held). It does not say that one is announced or served.
		# TYPE ravel_vips gauge
		ravel_vips{state="desired"} 3
		ravel_vips{state="held"} 3
		# HELP ravel_vips_drift_total Addresses on Ravel's link that somebody else added or removed, as found on re-reading.
		# TYPE ravel_vips_drift_total counter
		ravel_vips_drift_total 4
	`
	if err := testutil.GatherAndCompare(r, strings.NewReader(want)); err != nil {
		t.Fatal(err)
	}
}

func TestSettings(t *testing.T) {
	root, s := fakeSysctls(t)
	ignore := filepath.Join(root, "net/ipv4/conf/all/arp_ignore")
	must(t, os.WriteFile(ignore, []byte("2\n"), 0o644)) // more than we ask for stays
	must(t, os.Remove(filepath.Join(root, "net/ipv4/conf/all/arp_announce")))
	l := New(Options{Sysctl: s})
	t.Cleanup(func() { must(t, l.Close()) })
	l.kernel = newFake()
	_, err := l.Apply(t.Context(), addrs("192.0.2.1"))
	must(t, err)
	if b, _ := os.ReadFile(ignore); strings.TrimSpace(string(b)) != "2" {
		t.Fatalf("arp_ignore is %q, was 2", b)
	}
	if p := l.Problems(); len(p) != 1 || p[0].Where != "sysctl net/ipv4/conf/all/arp_announce" {
		t.Fatalf("problems: %v", p)
	}
}

// Any state leads to any other, whatever call fails on the way, and whatever others do to the link: an Apply without an
// error means that exactly what is wanted is held, and no wanted VIP has a blackhole.
func TestRandomWalk(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	eachKernel(t, func(t *testing.T, k kernel) {
		fake, _ := k.(*fakeKernel)
		steps := 60
		if fake != nil {
			steps = 1000
			fake.foreign("eth0", "veth", netip.MustParseAddr("198.51.100.1"))
		}
		l, clock := newLinks(t, k)
		pool := addrs("192.0.2.1 192.0.2.2 192.0.2.3 192.0.2.4 2001:db8::1 2001:db8::2 2001:db8::3 2001:db8::4")
		for range steps {
			var want []ravel.Addr
			for _, a := range pool {
				if rng.IntN(2) == 0 {
					want = append(want, a)
				}
			}
			switch found, err := k.link("ravel0"); rng.IntN(10) {
			case 0:
				if err == nil {
					must(t, k.delLink(found.index))
					l.Resync()
				}
			case 1:
				if err == nil {
					must(t, k.addAddr(found.index, netip.MustParseAddr("203.0.113.1")))
					must(t, k.delAddr(found.index, pool[0].VIP))
					l.Resync()
				}
			case 2:
				l, _ = newLinks(t, k)
				l.now = func() time.Time { return *clock }
			}
			*clock = clock.Add(time.Duration(rng.IntN(90)) * time.Second)
			if fake != nil && rng.IntN(3) == 0 {
				fake.failAt = 1 + rng.IntN(8)
			}
			_, err := l.Apply(t.Context(), want)
			if fake != nil {
				fake.failAt = 0
			}
			if err != nil {
				_, err = l.Apply(t.Context(), want)
			}
			must(t, err)
			all, err := k.addrs()
			must(t, err)
			var onLink []netip.Addr
			for _, a := range all {
				if a.link == "ravel0" {
					onLink = append(onLink, a.addr)
				}
			}
			slices.SortFunc(onLink, netip.Addr.Compare)
			var wanted []netip.Addr
			for _, a := range want {
				wanted = append(wanted, a.VIP)
			}
			if !slices.Equal(onLink, wanted) {
				t.Fatalf("on the link: %v; wanted: %v", onLink, wanted)
			}
			holes, err := k.holes()
			must(t, err)
			for _, a := range holes {
				if slices.Contains(wanted, a) {
					t.Fatalf("%s is held and has a blackhole", a)
				}
				if due := l.holes[a]; !due.After(*clock) {
					t.Fatalf("the blackhole for %s was due at %s, it is %s", a, due, *clock)
				}
			}
		}
		did, err := l.Cleanup(t.Context(), true)
		must(t, err)
		done, err := l.Cleanup(t.Context(), false)
		must(t, err)
		if !slices.Equal(did, done) {
			t.Fatalf("said %q, did %q", did, done)
		}
		left, err := l.Cleanup(t.Context(), false)
		must(t, err)
		if len(left) != 0 {
			t.Fatalf("left: %q", left)
		}
		if fake != nil && len(fake.links) != 1 {
			t.Fatalf("links left: %v", fake.links)
		}
	})
}

// A start with another name of the link takes the VIPs over, and the old link goes when the new one has them.
func TestAnotherName(t *testing.T) {
	eachKernel(t, func(t *testing.T, k kernel) {
		l, _ := newLinks(t, k)
		_, err := l.Apply(t.Context(), addrs("192.0.2.1 192.0.2.2 2001:db8::1"))
		must(t, err)
		must(t, k.addLink("foreign0"))
		foreign, err := k.link("foreign0")
		must(t, err)
		must(t, k.setUp(foreign.index))
		other := New(Options{Link: "vips0", Sysctl: sysctl.New(t.TempDir(), "")})
		other.kernel = k
		held, err := other.Apply(t.Context(), addrs("192.0.2.1 2001:db8::1"))
		must(t, err)
		if got := text(held); got != "192.0.2.1 2001:db8::1" {
			t.Fatalf("held %q", got)
		}
		if _, err := k.link("ravel0"); !errors.Is(err, errNoLink) {
			t.Errorf("the old link: %v", err)
		}
		if _, err := k.link("foreign0"); err != nil {
			t.Errorf("another's link: %v", err)
		}
		found, err := k.addrs()
		must(t, err)
		for _, a := range found {
			if a.link != "vips0" {
				t.Errorf("%s is on %q", a.addr, a.link)
			}
		}
		must(t, other.Close())
	})
}

// Links of ours are removed whatever their name; others, also dummies, stay.
func TestCleanupOfAnotherName(t *testing.T) {
	eachKernel(t, func(t *testing.T, k kernel) {
		l, _ := newLinks(t, k)
		_, err := l.Apply(t.Context(), addrs("192.0.2.1"))
		must(t, err)
		must(t, k.addLink("foreign0"))
		foreign, err := k.link("foreign0")
		must(t, err)
		must(t, k.setUp(foreign.index))
		other := New(Options{Link: "vips0"})
		other.kernel = k
		want := []string{"ip link delete ravel0"}
		for _, dry := range []bool{true, false} {
			did, err := other.Cleanup(t.Context(), dry)
			must(t, err)
			if !slices.Equal(did, want) {
				t.Fatalf("dry run %t: %q, want %q", dry, did, want)
			}
		}
		if _, err := k.link("ravel0"); !errors.Is(err, errNoLink) {
			t.Fatalf("our link after cleanup: %v", err)
		}
		if _, err := k.link("foreign0"); err != nil {
			t.Fatalf("another's link after cleanup: %v", err)
		}
	})
}

// BenchmarkApply changes one of 1,000 VIPs, so that the cost of what does not change shows.
func BenchmarkApply(b *testing.B) {
	l := New(Options{Sysctl: sysctl.New(b.TempDir(), "")})
	defer l.Close()
	l.kernel = newFake()
	var all []ravel.Addr
	for n := range 1000 {
		all = append(all, ravel.Addr{VIP: netip.AddrFrom4([4]byte{198, 18, byte(n >> 8), byte(n)})})
	}
	for n := 0; b.Loop(); n++ {
		if _, err := l.Apply(b.Context(), all[n%2:]); err != nil {
			b.Fatal(err)
		}
	}
}
