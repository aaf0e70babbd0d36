package ifaddr

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// eachKernel runs a test on the fake kernel and on the real one, so that the first stays true to the second.
func eachKernel(t *testing.T, fn func(t *testing.T, k kernel)) {
	t.Run("fake", func(t *testing.T) { fn(t, newFake()) })
	t.Run("real", func(t *testing.T) {
		nettest.Need(t, nettest.Dummy)
		nettest.InNetns(t, func() { fn(t, newNetlink()) })
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestKernelConformance(t *testing.T) {
	vip4, vip6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	eachKernel(t, func(t *testing.T, k kernel) {
		if _, err := k.link("ravel0"); !errors.Is(err, errNoLink) {
			t.Fatalf("a link that is not there: %v", err)
		}
		must(t, k.addLink("ravel0"))
		if err := k.addLink("ravel0"); !errors.Is(err, errExists) {
			t.Fatalf("a link that is there: %v", err)
		}
		made, err := k.link("ravel0")
		must(t, err)
		if want := (link{made.index, "dummy", "", false, true}); made != want || !made.ours() {
			t.Fatalf("new link: got %+v, want %+v, ours", made, want)
		}
		if names, err := k.aliased(); err != nil || len(names) != 0 {
			t.Fatalf("links with our alias: %q, %v; it has none yet", names, err)
		}
		must(t, k.setAlias(made.index))
		if names, err := k.aliased(); err != nil || !slices.Equal(names, []string{"ravel0"}) {
			t.Fatalf("links with our alias: %q, %v", names, err)
		}
		must(t, k.setUp(made.index))
		for _, a := range []netip.Addr{vip4, vip6, vip4, vip6} { // twice: EEXIST is fine
			must(t, k.addAddr(made.index, a))
		}
		full, err := k.link("ravel0")
		must(t, err)
		if want := (link{made.index, "dummy", "ravel", true, false}); full != want || !full.ours() {
			t.Fatalf("link in use: got %+v, want %+v, ours", full, want)
		}
		all, err := k.addrs()
		must(t, err)
		for _, a := range []netip.Addr{vip4, vip6} {
			if !slices.Contains(all, addr{a, made.index, "ravel0"}) {
				t.Fatalf("%s is not among %v", a, all)
			}
		}
		for range 2 {
			for _, a := range []netip.Addr{vip4, vip6} {
				must(t, k.addHole(a))
			}
		}
		holes, err := k.holes()
		must(t, err)
		slices.SortFunc(holes, netip.Addr.Compare)
		if !slices.Equal(holes, []netip.Addr{vip4, vip6}) {
			t.Fatalf("blackholes: %v", holes)
		}
		for range 2 {
			for _, a := range []netip.Addr{vip4, vip6} {
				must(t, k.delAddr(made.index, a))
				must(t, k.delHole(a))
			}
		}
		holes, err = k.holes()
		must(t, err)
		if len(holes) != 0 {
			t.Fatalf("blackholes left: %v", holes)
		}
		must(t, k.delLink(made.index))
		if err := k.delLink(made.index); !errors.Is(err, errNoLink) {
			t.Fatalf("deleting a link twice: %v", err)
		}
		if err := k.addAddr(made.index, vip4); !errors.Is(err, errNoLink) {
			t.Fatalf("adding an IPv4 address to a link that is gone: %v", err)
		}
		if err := k.addAddr(made.index, vip6); !errors.Is(err, errNoLink) {
			t.Fatalf("adding an IPv6 address to a link that is gone: %v", err)
		}
		must(t, k.delAddr(made.index, vip4))
		must(t, k.delAddr(made.index, vip6))
	})
}
