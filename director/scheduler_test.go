package director

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
)

// noting is a HoldBack that writes into the fake's list of changes.
func noting(f *fake, err error) func(ravel.ServiceKey) (func(), error) {
	note := func(s string) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.changes = append(f.changes, s)
	}
	return func(k ravel.ServiceKey) (func(), error) {
		note("hold back " + k.String())
		return func() { note("release " + k.String()) }, err
	}
}

func TestSchedulerChange(t *testing.T) {
	before := vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1))
	for _, test := range []struct {
		name    string
		next    ravel.VirtualService
		unbound time.Duration
		refuses error // of HoldBack
		missing []string
		want    []string
		held    int
		problem ravel.Problem
		fails   error
	}{
		{
			name: "new flows are held back", next: scheduled(before, "wrr", 0), held: 1,
			want: []string{"hold back tcp 192.0.2.1:80", "set 6 192.0.2.1:80 wrr", "release tcp 192.0.2.1:80"},
		},
		{
			name: "held without one", next: scheduled(before, "wrr", 0), unbound: time.Millisecond, held: 1,
			want: []string{
				"hold back tcp 192.0.2.1:80", "set 6 192.0.2.1:80 none", "set 6 192.0.2.1:80 wrr", "release tcp 192.0.2.1:80",
			},
		},
		{
			name: "a flag is no scheduler", next: scheduled(before, ravel.MH, ravel.HashPort), held: 1,
			want: []string{"set 6 192.0.2.1:80 mh"},
		},
		{
			name: "real servers come first", next: scheduled(vs("tcp 192.0.2.1:80", rs("10.0.0.2", 1)), "wrr", 0), held: 1,
			want: []string{
				"add 10.0.0.2 to 6 192.0.2.1:80, weight 1", "delete 10.0.0.1 from 6 192.0.2.1:80",
				"hold back tcp 192.0.2.1:80", "set 6 192.0.2.1:80 wrr", "release tcp 192.0.2.1:80",
			},
		},
		{
			name: "holding back fails", next: scheduled(before, "wrr", 0), refuses: errors.New("no iptables"), held: 1,
			want: []string{"hold back tcp 192.0.2.1:80", "set 6 192.0.2.1:80 wrr", "release tcp 192.0.2.1:80"},
			problem: ravel.Problem{
				Where: "tcp 192.0.2.1:80", What: "new flows could not be held back while its scheduler changed: no iptables",
			},
		},
		{
			name: "without its module the old one stays", next: scheduled(before, "wrr", 0), missing: []string{"wrr"}, held: 1,
			want: []string{"hold back tcp 192.0.2.1:80", "release tcp 192.0.2.1:80"},
			problem: ravel.Problem{
				Where: "tcp 192.0.2.1:80", What: "the kernel has no scheduler wrr; the service is not as it should be",
				Fix: "modprobe ip_vs_wrr",
			},
			fails: errModule,
		},
		{
			name: "without its module the old one comes back", next: scheduled(before, "wrr", 0), missing: []string{"wrr"}, unbound: time.Millisecond, held: 1,
			want: []string{"hold back tcp 192.0.2.1:80", "set 6 192.0.2.1:80 none", "set 6 192.0.2.1:80 mh", "release tcp 192.0.2.1:80"},
			problem: ravel.Problem{
				Where: "tcp 192.0.2.1:80", What: "the kernel has no scheduler wrr; the service is not as it should be",
				Fix: "modprobe ip_vs_wrr",
			},
			fails: errModule,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := &fake{missing: test.missing}
			d := start(t, Options{open: f.handle, HoldBack: noting(f, test.refuses), Unbound: test.unbound})
			apply(t, d, before)
			f.changes = nil
			held, err := d.Apply(t.Context(), []ravel.VirtualService{test.next})
			if !errors.Is(err, test.fails) || len(held) != test.held {
				t.Errorf("held %v, %v; want %d, %v", held, err, test.held, test.fails)
			}
			if test.fails != nil && !strings.Contains(err.Error(), "scheduler wrr of tcp 192.0.2.1:80") {
				t.Errorf("%v does not name the scheduler", err)
			}
			if diff := cmp.Diff(test.want, f.changes); diff != "" {
				t.Errorf("requests (-want +got):\n%s", diff)
			}
			var want []ravel.Problem
			if test.problem != (ravel.Problem{}) {
				want = []ravel.Problem{test.problem}
			}
			if diff := cmp.Diff(want, d.Problems()); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
			if test.fails != nil {
				f.missing = nil // as by modprobe
				apply(t, d, test.next)
				if p := d.Problems(); len(p) > 0 {
					t.Errorf("the problem stays: %v", p)
				}
			}
		})
	}
}

// TestSchedulerMissing says what a person must load, and the old scheduler serves on.
func TestSchedulerMissing(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k := opened(t, open)
		d := start(t, Options{open: open})
		one, other := vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)), vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1))
		apply(t, d, one)
		held, err := d.Apply(t.Context(), []ravel.VirtualService{scheduled(one, "nosuch", 0), other})
		if !errors.Is(err, errModule) || !slices.Equal(held, []ravel.ServiceKey{one.Key, other.Key}) {
			t.Errorf("held %v, %v; want both", held, err)
		}
		if p := d.Problems(); len(p) != 1 || p[0].Fix != "modprobe ip_vs_nosuch" {
			t.Errorf("problems %v", p)
		}
		if got := dump(t, k); !strings.HasPrefix(got, "-A -t 192.0.2.1:80 -s mh -b") {
			t.Errorf("table:\n%s", got)
		}
	})
}

// TestKilledBeforeBinding starts with what a process leaves that dies between making a service and binding it, or in
// the middle of a scheduler change.
func TestKilledBeforeBinding(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k := opened(t, open)
		want := []ravel.VirtualService{
			vs("tcp 192.0.2.1:80", rs("10.0.0.2", 1), rs("10.0.0.1", 1)), vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1)),
			vs("tcp 192.0.2.3:80", rs("10.0.0.1", 1)),
		}
		for i, scheduler := range []string{none, "rr"} {
			at := id{ServiceKey: want[i].Key}
			left := service{scheduler: scheduler, flags: flagOurs, netmask: 0xffffffff}
			if err := k.NewService(at.full(left)); err != nil {
				t.Fatal(err)
			}
			if err := k.NewDestination(at.request(), real{at: addrPort("10.0.0.1", 80), weight: 1, method: 3}.destination()); err != nil {
				t.Fatal(err)
			}
		}
		held := 0
		d := start(t, Options{open: open, HoldBack: func(ravel.ServiceKey) (func(), error) {
			held++
			return func() {}, nil
		}})
		apply(t, d, want...)
		fresh := ""
		for _, v := range want {
			fresh += "-A -t " + v.Key.VIP.String() + ":80 -s mh -b mh-fallback,mh-port,flag-3\n"
			for _, r := range v.RealServers {
				fresh += "-a -t " + v.Key.VIP.String() + ":80 -r " + r.Addr.String() + ":80 -g -w 1\n"
			}
		}
		if diff := cmp.Diff(fresh, dump(t, k)); diff != "" {
			t.Errorf("table (-want +got):\n%s", diff)
		}
		if held != 1 {
			t.Errorf("new flows were held back %d times, want once: for the one that was bound", held)
		}
	})
}
