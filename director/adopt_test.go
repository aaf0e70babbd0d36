package director

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/ipvs"

	"github.com/ravel-lb/ravel"
)

// made is a service as another program makes it.
func made(t *testing.T, k kernel, key ravel.ServiceKey, s service) id {
	t.Helper()
	i := id{ServiceKey: key}
	s.netmask = netmaskOf(key.VIP)
	if err := k.NewService(i.full(s)); err != nil {
		t.Fatal(err)
	}
	for _, r := range s.reals {
		if err := k.NewDestination(i.request(), r.destination()); err != nil {
			t.Fatal(err)
		}
	}
	return i
}

func direct(addr string, port uint16, weight int) real {
	return real{at: netip.AddrPortFrom(netip.MustParseAddr(addr), port), weight: weight, method: ipvs.ConnectionFlagDirectRoute}
}

// TestAdopt takes over what the original leaves: each of its schedulers and both families, in place.
func TestAdopt(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k := opened(t, open)
		four, six, dns := key("tcp 192.0.2.1:80"), key("tcp [2001:db8::1]:443"), key("udp 192.0.2.1:53")
		made(t, k, four, service{scheduler: "mh", flags: 0x18, reals: []real{direct("10.0.0.1", 80, 1), direct("10.0.0.2", 80, 2), direct("10.0.0.9", 80, 0)}})
		made(t, k, six, service{scheduler: "wrr", reals: []real{direct("fd00::1", 443, 3)}})
		made(t, k, dns, service{scheduler: "wlc", reals: []real{direct("10.0.0.1", 53, 1)}})
		others := []ravel.ServiceKey{key("tcp 192.0.2.1:81"), key("tcp 192.0.2.1:82"), key("tcp 192.0.2.1:83")}
		made(t, k, others[0], service{scheduler: "rr", reals: []real{{at: addrPort("10.0.0.1", 81), weight: 1}}}) // by masquerading
		made(t, k, others[1], service{scheduler: "rr", reals: []real{direct("10.0.0.1", 8082, 1)}})               // another port
		made(t, k, others[2], service{scheduler: "rr", flags: flagPersistent, timeout: 300})                      // sticky
		var foreign []string
		for line := range strings.Lines(dump(t, k)) {
			if strings.Contains(line, ":81") || strings.Contains(line, ":8082") || strings.Contains(line, ":82 ") || strings.Contains(line, ":83") {
				foreign = append(foreign, line)
			}
		}

		want := []ravel.VirtualService{
			vs("udp 192.0.2.1:53", rs("10.0.0.1", 1)),
			vs("tcp 192.0.2.1:80", rs("10.0.0.2", 2), rs("10.0.0.1", 1)),
			vs("tcp 192.0.2.1:81", rs("10.0.0.1", 1)), vs("tcp 192.0.2.1:82", rs("10.0.0.1", 1)), vs("tcp 192.0.2.1:83", rs("10.0.0.1", 1)),
			vs("tcp [2001:db8::1]:443", rs("fd00::1", 3)),
		}
		// Not asked to, it leaves all of it alone.
		d := start(t, Options{open: open})
		if held, err := d.Apply(t.Context(), want); err != nil || len(held) > 0 {
			t.Fatalf("held %v, %v", held, err)
		}
		before := dump(t, k)

		// While nobody is to take flows, what somebody decided before stays.
		d = start(t, Options{open: open, Adopt: true})
		waits := make([]ravel.VirtualService, len(want))
		for n, v := range want {
			waits[n] = v
			waits[n].RealServers = nil
			for _, r := range v.RealServers {
				r.Weight, r.LastWeight = 0, 0
				waits[n].RealServers = append(waits[n].RealServers, r)
			}
		}
		if held, err := d.Apply(t.Context(), waits); err != nil || len(held) > 0 || dump(t, k) != before || len(d.Foreign()) != 6 {
			t.Fatalf("held %v, %v; foreign %v; before:\n%safter:\n%s", held, err, d.Foreign(), before, dump(t, k))
		}

		held, err := d.Apply(t.Context(), want)
		if diff := cmp.Diff([]ravel.ServiceKey{dns, four, six}, held, equalAddrs); err != nil || diff != "" {
			t.Fatalf("%v, held (-want +got):\n%s", err, diff)
		}
		if diff := cmp.Diff(others, d.Foreign(), equalAddrs); diff != "" {
			t.Errorf("foreign (-want +got):\n%s", diff)
		}
		if n := len(d.Problems()); n != 3 {
			t.Errorf("%d problems of 3: %v", n, d.Problems())
		}
		after := dump(t, k)
		for _, line := range foreign {
			if !strings.Contains(after, line) {
				t.Errorf("%q is gone:\n%s", line, after)
			}
		}
		for _, gone := range []string{"10.0.0.9", "-s wrr", "-s wlc"} {
			if strings.Contains(after, gone) {
				t.Errorf("%s is still there:\n%s", gone, after)
			}
		}
		// It is as if they had been ours from the first: a director that does not adopt holds them, and changes nothing.
		d = start(t, Options{open: open})
		if held, err := d.Apply(t.Context(), want); err != nil || len(held) != 3 || dump(t, k) != after {
			t.Errorf("a later start: held %v, %v:\n%s", held, err, dump(t, k))
		}
		if _, err := d.Cleanup(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		if left := dump(t, k); left != strings.Join(foreign, "") {
			t.Errorf("cleanup leaves:\n%s", left)
		}
	})
}

// TestAdoptedServicesTakeFlowsThroughout looks at the service after every request that takes it over: it is never gone,
// never without a scheduler, and never without a real server that takes flows.
func TestAdoptedServicesTakeFlowsThroughout(t *testing.T) {
	for _, scheduler := range []string{"mh", "wrr", "rr"} {
		f := &fake{}
		k := opened(t, f.handle)
		at := key("tcp 192.0.2.1:80")
		made(t, k, at, service{scheduler: scheduler, reals: []real{direct("10.0.0.1", 80, 1), direct("10.0.0.2", 80, 1), direct("10.0.0.3", 80, 1)}})
		// What is changed while new flows are held back they do not meet.
		held := false
		d := start(t, Options{open: f.handle, Adopt: true, HoldBack: func(ravel.ServiceKey) (func(), error) {
			held = true
			return func() { held = false }, nil
		}})
		f.mu.Lock()
		f.changed = func() {
			s := f.find(id{ServiceKey: at}.request())
			if s == nil {
				t.Errorf("%s: the service is gone after %q", scheduler, f.changes[len(f.changes)-1])
				return
			}
			takes := 0
			for _, r := range s.reals {
				if r.Weight > 0 {
					takes++
				}
			}
			if (s.SchedName == none || takes == 0) && !held {
				t.Errorf("%s: nobody takes flows after %q", scheduler, f.changes[len(f.changes)-1])
			}
		}
		f.mu.Unlock()
		apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.4", 2), rs("10.0.0.3", 1), rs("10.0.0.1", 1)))
	}
}

// TestAdoptFails has each request fail once: the next Apply ends well, and nothing else is touched.
func TestAdoptFails(t *testing.T) {
	for n := 1; ; n++ {
		f := &fake{}
		k := opened(t, f.handle)
		made(t, k, key("tcp 192.0.2.1:80"), service{scheduler: "wrr", reals: []real{direct("10.0.0.1", 80, 1), direct("10.0.0.2", 80, 1)}})
		d := start(t, Options{open: f.handle, Adopt: true})
		want := vs("tcp 192.0.2.1:80", rs("10.0.0.2", 1), rs("10.0.0.1", 1))
		f.mu.Lock()
		before := f.calls
		f.failAt = before + n
		f.mu.Unlock()
		_, err := d.Apply(t.Context(), []ravel.VirtualService{want})
		f.mu.Lock()
		done := f.calls < f.failAt
		f.failAt = 0
		f.mu.Unlock()
		if done {
			if err != nil {
				t.Fatal(err)
			}
			return
		}
		apply(t, d, want)
		if got := dump(t, k); !strings.Contains(got, "-s mh") || strings.Count(got, "-a ") != 2 {
			t.Errorf("after a fault of request %d:\n%s", n, got)
		}
	}
}
