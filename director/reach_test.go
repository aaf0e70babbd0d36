package director

import (
	"errors"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/ipvs"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// links makes two links with a subnet each and a way out through one of them; the test's end removes them.
func links(t *testing.T) {
	t.Helper()
	nettest.Need(t, nettest.Root)
	nettest.Shell(t, `
ip link add reach0 type veth peer name reach1
ip link set reach0 addrgenmode none; ip link set reach1 addrgenmode none
ip link set reach0 up; ip link set reach1 up
for i in {1..1000}; do ip link show reach0 | grep -q "state UP" && break; sleep 0.01; done
ip addr add 10.9.0.1/24 dev reach0
ip -6 addr add 2001:db8:9::1/64 dev reach0 nodad
ip route add 10.8.0.0/16 via 10.9.0.2
ip -6 route add 2001:db8:8::/48 via 2001:db8:9::2
ip route add blackhole 10.7.1.0/24
ip route add unreachable 10.7.2.0/24
ip route add prohibit 10.7.3.0/24
ip route add 10.6.0.0/16 nexthop via 10.9.0.2 nexthop via 10.9.0.3
ip route add 10.5.0.1/32 dev reach0`)
	t.Cleanup(func() {
		nettest.Shell(t, `ip link del reach0
for net in 10.7.1.0/24 10.7.2.0/24 10.7.3.0/24; do ip route del $net; done`)
	})
}

func TestOnLink(t *testing.T) {
	links(t)
	r, err := newReach(nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	for addr, want := range map[string]answer{
		"10.9.0.5":      {onLink: true},
		"10.9.0.1":      {onLink: true}, // our own
		"10.5.0.1":      {onLink: true},
		"10.8.1.1":      {},
		"10.6.1.1":      {},
		"10.7.1.1":      {err: errNoRoute},
		"10.7.2.1":      {err: errNoRoute},
		"10.7.3.1":      {err: errNoRoute},
		"10.4.0.1":      {err: errNoRoute},
		"2001:db8:9::5": {onLink: true},
		"2001:db8:8::5": {},
		"2001:db8:7::5": {err: errNoRoute},
	} {
		if got := r.ask(netip.MustParseAddr(addr)); got.onLink != want.onLink || !errors.Is(got.err, want.err) {
			t.Errorf("%s: on-link %t, %v; want %t, %v", addr, got.onLink, got.err, want.onLink, want.err)
		}
	}
}

func TestRoutesChange(t *testing.T) {
	links(t)
	r, err := newReach(nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	for _, change := range []struct {
		name, script, addr string
		before, after      bool
	}{
		{"a route", "ip route add 10.4.0.0/16 via 10.9.0.2; ip route change 10.4.0.0/16 dev reach0", "10.4.0.1", false, true},
		{"an IPv6 route", "ip -6 route replace 2001:db8:8::/48 dev reach0", "2001:db8:8::5", false, true},
		{"an address", "ip addr add 10.3.0.1/24 dev reach0", "10.3.0.5", false, true},
		{"a link", "ip link set reach0 down", "10.9.0.5", true, false},
	} {
		a := netip.MustParseAddr(change.addr)
		if got := r.ask(a); got.onLink != change.before {
			t.Fatalf("%s: on-link %t before", change.name, got.onLink)
		}
		nettest.Shell(t, change.script)
		deadline := time.After(10 * time.Second)
		reached := func() bool {
			is := r.ask(a)
			return is.err == nil && is.onLink
		}
		for reached() != change.after {
			select {
			case <-r.changed:
			case <-deadline:
				t.Fatalf("%s: on-link %t still", change.name, r.ask(a).onLink)
			}
		}
	}
	// The link is down now, and packets go nowhere. That is no reason to forward in another way.
	near := ravel.RealServer{Addr: netip.MustParseAddr("10.9.0.5"), Weight: 1}
	if flag, problem := r.method(near); flag != ipvs.ConnectionFlagDirectRoute || problem == nil {
		t.Errorf("with its link down a real server is forwarded to by %#x, problem %v; want direct as before, and a problem", flag, problem)
	}
}

// TestAddressesOfServicesChangeNoRoute adds and removes VIPs, as they come and go all day.
func TestAddressesOfServicesChangeNoRoute(t *testing.T) {
	links(t)
	var changes atomic.Int64
	w, err := newWatch(func() { changes.Add(1) }, slog.New(slog.DiscardHandler), subscribe, again)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	nettest.Shell(t, `
ip addr add 192.0.2.1/32 dev reach0; ip addr del 192.0.2.1/32 dev reach0
ip -6 addr add 2001:db8::1/128 dev reach0 nodad; ip -6 addr del 2001:db8::1/128 dev reach0
ip route add blackhole 192.0.2.1/32; ip route del blackhole 192.0.2.1/32
ip -6 route add blackhole 2001:db8::1/128; ip -6 route del blackhole 2001:db8::1/128
ip route add 10.2.0.0/16 dev reach0`)
	deadline := time.Now().Add(10 * time.Second)
	for changes.Load() == 0 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if n := changes.Load(); n != 1 {
		t.Errorf("%d changes seen, want that of the last route only", n)
	}
}

func TestOpen(t *testing.T) {
	nettest.Need(t, nettest.Root)
	k, err := open()
	if err == nil {
		k.Close()
	}
	if has := nettest.Has(nettest.IPVS); has != (err == nil) || !has && !errors.Is(err, errNoIPVS) {
		t.Errorf("opening IPVS: %v; this kernel has it: %t", err, has)
	}
}
