package director

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/ipvs"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
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

// left is what the original leaves in IPVS, in the words by which it put it there: each service of the rack under a
// scheduler of its own, the real servers in the order of its maps, and a node without pods.
const left = `
ipvsadm -R <<'END'
-A -t 192.0.2.1:80 -s wrr
-A -u 192.0.2.1:80 -s mh -b flag-1,flag-2
-A -t [2001:db8:2::1]:80 -s mh -b flag-1
-A -u [2001:db8:2::1]:80 -s rr
-a -t 192.0.2.1:80 -r 10.6.0.12:80 -g -w 1 -x 0 -y 0
-a -t 192.0.2.1:80 -r 10.6.0.14:80 -g -w 0 -x 0 -y 0
-a -t 192.0.2.1:80 -r 10.6.0.11:80 -g -w 3 -x 0 -y 0
-a -t 192.0.2.1:80 -r 10.6.0.13:80 -g -w 2 -x 60000 -y 40000
-a -u 192.0.2.1:80 -r 10.6.0.11:80 -g -w 1 -x 0 -y 0
-a -u 192.0.2.1:80 -r 10.6.0.13:80 -g -w 1 -x 0 -y 0
-a -u 192.0.2.1:80 -r 10.6.0.12:80 -g -w 1 -x 0 -y 0
-a -t [2001:db8:2::1]:80 -r [2001:db8:6::12]:80 -g -w 1 -x 0 -y 0
-a -t [2001:db8:2::1]:80 -r [2001:db8:6::11]:80 -g -w 1 -x 0 -y 0
-a -t [2001:db8:2::1]:80 -r [2001:db8:6::13]:80 -g -w 1 -x 0 -y 0
-a -u [2001:db8:2::1]:80 -r [2001:db8:6::13]:80 -g -w 1 -x 0 -y 0
-a -u [2001:db8:2::1]:80 -r [2001:db8:6::11]:80 -g -w 1 -x 0 -y 0
-a -u [2001:db8:2::1]:80 -r [2001:db8:6::12]:80 -g -w 1 -x 0 -y 0
END`

// TestAdoptedFlowsGoOn takes over what the original left, under open flows and new ones: each open flow keeps its real
// server, and no new one fails.
func TestAdoptedFlowsGoOn(t *testing.T) {
	r := newRack(t)
	nettest.Shell(t, left)
	var flows []*flow
	for _, vip := range rackVIPs {
		for range 16 {
			flows = append(flows, r.open("tcp", vip), r.open("udp", vip))
		}
	}
	r.start(Options{Adopt: true, HoldBack: func(key ravel.ServiceKey) (func(), error) {
		command := "iptables"
		if key.VIP.Is6() {
			command = "ip6tables"
		}
		rule := fmt.Sprintf("INPUT -d %s -p %s --dport %d -j DROP", key.VIP, key.Proto, key.Port)
		if key.Proto == ravel.TCP {
			rule = strings.Replace(rule, "-j", "--syn -j", 1)
		}
		nettest.Shell(t, command+" -w -I "+rule)
		return func() { nettest.Shell(t, command+" -w -D "+rule) }, nil
	}})
	// New ones, one after the other, of each VIP.
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var opened, failed atomic.Int32
	for _, vip := range rackVIPs {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				var conn net.Conn
				var err error
				inside(t, "rack9", func() error {
					conn, err = (&net.Dialer{Timeout: 10 * time.Second}).Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr(vip), 80).String())
					return nil
				})
				if err == nil {
					_, err = (&flow{Conn: conn}).ask()
					_ = conn.Close()
				}
				if opened.Add(1); err != nil {
					failed.Add(1)
					t.Errorf("a new flow to %s: %v", vip, err)
				}
			}
		})
	}
	want := r.services("3 2 1")
	apply(t, r.d, want...)
	close(stop)
	wg.Wait()
	if diff := cmp.Diff(shown(want), dump(t, r.k)); diff != "" {
		t.Fatalf("table (-want +got):\n%s", diff)
	}
	for _, f := range flows {
		if who, err := f.ask(); who != f.real || err != nil {
			t.Errorf("flow from %s to %s began at %s: now %q, %v", f.from, f.RemoteAddr(), f.real, who, err)
		}
	}
	t.Logf("%d open flows, %d new ones, %d failed", len(flows), opened.Load(), failed.Load())
}
