package director

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
)

// Thresholds are edited in place: no real server is taken out for them, and none that is as it should be is touched.
func TestThresholdsAreEditedInPlace(t *testing.T) {
	for _, service := range []ravel.VirtualService{
		scheduled(vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), rs("10.0.0.1", 1)), "wlc", 0),
		scheduled(vs("udp [2001:db8::1]:80", rs("2001:db8::b", 2), drained("2001:db8::a", 1)), "rr", 0),
	} {
		f := &fake{}
		d := start(t, Options{open: f.handle})
		apply(t, d, service)
		for _, limits := range [][2]int{{100, 80}, {100, 0}, {99, 98}, {1<<31 - 1, 0}, {0, 0}} {
			f.changes = nil
			want := limited(service, limits[0], limits[1])
			apply(t, d, want)
			apply(t, d, want)
			if n := len(f.changes); n != 2 || slices.ContainsFunc(f.changes, func(s string) bool { return !strings.HasPrefix(s, "set ") }) {
				t.Errorf("%v: %q, want two edits", limits, f.changes)
			}
			read, err := d.Read(t.Context())
			if err != nil || len(read) != 1 || read[0].UpperThreshold != limits[0] || read[0].LowerThreshold != limits[1] {
				t.Errorf("%v: read %+v, %v", limits, read, err)
			}
		}
	}
}

// Which services keep their flows when a director is lost is told of ours alone.
func TestStatusTellsWhoseFlowsAreNotKept(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k := opened(t, open)
		foreign := vs("tcp 192.0.2.9:80")
		if err := k.NewService(id{ServiceKey: foreign.Key}.full(service{scheduler: "rr", netmask: 0xffffffff})); err != nil {
			t.Fatal(err)
		}
		d := start(t, Options{open: open})
		apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)), scheduled(vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1)), "sh", 0),
			limited(scheduled(vs("udp [2001:db8::1]:80", rs("2001:db8::a", 1)), "wlc", 0), 7, 5))
		status, err := d.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]bool{}
		for _, s := range status {
			got[s.Key().String()] = s.NotKept
			if s.Scheduler == "wlc" && (s.Reals[0].Upper != 7 || s.Reals[0].Lower != 5) {
				t.Errorf("thresholds of %+v, want 7 and 5", s.Reals[0])
			}
		}
		want := map[string]bool{
			"tcp 192.0.2.1:80": false, "tcp 192.0.2.2:80": true, "tcp 192.0.2.9:80": false, "udp [2001:db8::1]:80": true,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}

// refused opens a flow that nobody takes.
func (r *rack) refused(proto, vip string) bool {
	r.t.Helper()
	var conn net.Conn
	var err error
	inside(r.t, "rack9", func() error {
		ctx, cancel := context.WithTimeout(r.t.Context(), 500*time.Millisecond)
		defer cancel()
		conn, err = (&net.Dialer{}).DialContext(ctx, proto, netip.AddrPortFrom(netip.MustParseAddr(vip), 80).String())
		return nil
	})
	if err != nil {
		return true
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(500 * time.Millisecond))
	if _, err = conn.Write([]byte("who\n")); err == nil {
		_, err = conn.Read(make([]byte, 10))
	}
	return err != nil
}

// TestThresholdsHold has real servers take as many flows as they may, and more at once when they may, with those that are
// open unharmed.
func TestThresholdsHold(t *testing.T) {
	r := newRack(t)
	r.port = uint16(20000 + rand.IntN(30000)) // from which no flow of a test before is open: that would not be scheduled
	r.start(Options{})
	var want []ravel.VirtualService
	for _, v := range r.services("3 2 1") {
		want = append(want, scheduled(v, "rr", 0))
	}
	limit := func(n int) {
		t.Helper()
		for i := range want {
			want[i] = limited(want[i], n, 0)
		}
		apply(t, r.d, want...)
	}
	var flows []*flow
	for n := 1; n <= 2; n++ {
		limit(n)
		for _, vip := range rackVIPs {
			for _, proto := range []string{"tcp", "udp"} {
				who := map[string]bool{}
				for range 3 {
					f := r.open(proto, vip)
					flows, who[f.real] = append(flows, f), true
				}
				if len(who) != 3 {
					t.Errorf("limit %d: three flows to %s %s went to %v", n, proto, vip, who)
				}
				if !r.refused(proto, vip) {
					t.Errorf("limit %d: one flow more to %s %s was taken", n, proto, vip)
				}
			}
		}
	}
	limit(0)
	for _, vip := range rackVIPs {
		flows = append(flows, r.open("tcp", vip), r.open("udp", vip))
	}
	for _, f := range flows {
		if who, err := f.ask(); who != f.real || err != nil {
			t.Errorf("a flow of %s is with %q now, %v", f.real, who, err)
		}
	}
}
