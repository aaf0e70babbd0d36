package director

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
)

// key reads "tcp 192.0.2.1:80".
func key(s string) ravel.ServiceKey {
	proto, at, _ := strings.Cut(s, " ")
	k := ravel.ServiceKey{Proto: ravel.TCP}
	if proto == "udp" {
		k.Proto = ravel.UDP
	}
	ap := netip.MustParseAddrPort(at)
	k.VIP, k.Port = ap.Addr(), ap.Port()
	return k
}

func addrPort(a string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(a), port)
}

// rs is a real server that is reached directly.
func rs(a string, weight int) ravel.RealServer {
	return ravel.RealServer{Addr: netip.MustParseAddr(a), Weight: weight, LastWeight: weight, Forwarding: ravel.Direct}
}

// drained is a real server with weight 0 that had a weight.
func drained(a string, last int) ravel.RealServer {
	r := rs(a, 0)
	r.LastWeight = last
	return r
}

func tunnelled(r ravel.RealServer) ravel.RealServer {
	r.Forwarding = ravel.Tunnel
	return r
}

// vs is a service with the defaults.
func vs(k string, reals ...ravel.RealServer) ravel.VirtualService {
	return ravel.VirtualService{Key: key(k), Scheduler: ravel.MH, Flags: ravel.Fallback | ravel.HashPort, RealServers: reals}
}

// all is on-link, but what behind names.
type plain struct {
	behind, nowhere []string
	*hostRoutes
}

// hostRoutes are the host routes of a fake kernel.
type hostRoutes struct {
	mu    sync.Mutex // guards the fields below
	list  map[netip.Addr]bool
	fault error // of adding one
}

func (h *hostRoutes) hosts() ([]netip.Addr, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.SortedFunc(maps.Keys(h.list), netip.Addr.Compare), nil
}

func (h *hostRoutes) addHost(a netip.Addr) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fault == nil {
		h.list[a] = true
	}
	return h.fault
}

func (h *hostRoutes) setHosts(addrs []netip.Addr) (taken []netip.Addr, err error) {
	var errs []error
	for _, a := range addrs {
		err := h.addHost(a)
		if err != nil {
			taken = append(taken, a)
		}
		errs = append(errs, err)
	}
	return taken, errors.Join(errs...)
}

func (h *hostRoutes) delHost(a netip.Addr) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.list, a)
	return nil
}

func (p plain) onLink(a netip.Addr) (bool, error) {
	for _, b := range p.nowhere {
		if a.String() == b {
			return false, errNoRoute
		}
	}
	for _, b := range p.behind {
		if a.String() == b {
			return false, nil
		}
	}
	return true, nil
}

func newHostRoutes() *hostRoutes { return &hostRoutes{list: map[netip.Addr]bool{}} }

func start(t testing.TB, o Options) *Director {
	t.Helper()
	if o.routes == nil {
		o.routes = plain{hostRoutes: newHostRoutes()}
	}
	d, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// apply applies and wants no fault and all held.
func apply(t testing.TB, d *Director, want ...ravel.VirtualService) {
	t.Helper()
	held, err := d.Apply(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	keys := []ravel.ServiceKey{}
	for _, v := range want {
		keys = append(keys, v.Key)
	}
	if diff := cmp.Diff(keys, held, equalAddrs); diff != "" {
		t.Fatalf("held (-want +got):\n%s\nproblems: %v", diff, d.Problems())
	}
}

func TestNewServiceIsBuiltBeforeItIsBound(t *testing.T) {
	f := &fake{}
	d := start(t, Options{open: f.handle})
	apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), drained("10.0.0.1", 3)))
	want := []string{
		"add 6 192.0.2.1:80 none",
		"add 10.0.0.1 to 6 192.0.2.1:80, weight 3",
		"set 10.0.0.1 of 6 192.0.2.1:80, weight 0",
		"add 10.0.0.2 to 6 192.0.2.1:80, weight 2",
		"set 6 192.0.2.1:80 mh",
	}
	if diff := cmp.Diff(want, f.changes); diff != "" {
		t.Fatalf("requests (-want +got):\n%s", diff)
	}
}

func TestOneWeightIsOneRequest(t *testing.T) {
	f := &fake{}
	d := start(t, Options{open: f.handle})
	apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), rs("10.0.0.1", 3)), vs("tcp 192.0.2.1:81", rs("10.0.0.2", 2)))
	calls := f.calls
	apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), rs("10.0.0.1", 4)), vs("tcp 192.0.2.1:81", rs("10.0.0.2", 2)))
	if n := f.calls - calls; n != 1 {
		t.Fatalf("%d requests for one weight, want 1", n)
	}
}
