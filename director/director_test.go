package director

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/ipvs"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/internal/sysctl"
)

// stuck is a kernel that does not answer until its handle is closed, as moby/ipvs waits when a netlink answer is lost.
type stuck struct {
	kernel
	closed chan struct{}
}

func (s stuck) GetServices() ([]*ipvs.Service, error) {
	<-s.closed
	return nil, os.ErrClosed
}

func (s stuck) Close() { close(s.closed) }

func TestContextEndsAStuckKernel(t *testing.T) {
	f := &fake{}
	first := true
	d := start(t, Options{open: func() (kernel, error) {
		if first {
			first = false
			return stuck{closed: make(chan struct{})}, nil
		}
		return f.handle()
	}})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	held, err := d.Apply(ctx, []ravel.VirtualService{vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1))})
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ErrUnknown) || held != nil {
		t.Fatalf("held %v, %v; want the deadline, and that nothing is known", held, err)
	}
	apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)))
}

func TestCloseEndsAStuckKernel(t *testing.T) {
	d := start(t, Options{open: func() (kernel, error) { return stuck{closed: make(chan struct{})}, nil }})
	done := make(chan error)
	go func() {
		_, err := d.Status(context.Background())
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("status of a stuck kernel: %v", err)
	case <-time.After(10 * time.Millisecond):
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Fatal("status of a closed director has no error")
	}
	if _, err := d.Apply(t.Context(), nil); !errors.Is(err, ErrClosed) {
		t.Fatalf("apply after close: %v, want ErrClosed", err)
	}
}

// TestCancelledMeansStop has ctx end in the middle of an Apply: nothing more is done, and the next one goes on.
func TestCancelledMeansStop(t *testing.T) {
	f := &fake{}
	d := start(t, Options{open: f.handle})
	ctx, cancel := context.WithCancel(t.Context())
	f.changed = func() {
		if len(f.changes) == 3 {
			cancel()
		}
	}
	want := []ravel.VirtualService{
		vs("tcp 192.0.2.1:80", rs("10.0.0.2", 1), rs("10.0.0.1", 1)), vs("tcp 192.0.2.2:80", rs("10.0.0.2", 1), rs("10.0.0.1", 1)),
	}
	if held, err := d.Apply(ctx, want); !errors.Is(err, context.Canceled) || !errors.Is(err, ErrUnknown) || held != nil {
		t.Fatalf("held %v, %v; want the cancellation, and that nothing is known", held, err)
	}
	apply(t, d, want...)
	if n := len(f.changes); n != 8 {
		t.Errorf("%d changes, want 8: %s", n, strings.Join(f.changes, "; "))
	}
}

// TestUnreadableIsNotEmpty has the kernel fail to tell its table.
func TestUnreadableIsNotEmpty(t *testing.T) {
	f := &fake{}
	d := start(t, Options{open: f.handle})
	want := vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1))
	apply(t, d, want)
	d.Resync()
	for n := range 2 { // the services, then the real servers
		f.failAt = f.calls + 1 + n
		if held, err := d.Apply(t.Context(), []ravel.VirtualService{want}); !errors.Is(err, ErrUnknown) || !errors.Is(err, unix.EIO) || held != nil {
			t.Errorf("held %v, %v; want ErrUnknown", held, err)
		}
	}
	apply(t, d, want)
	if n := len(f.changes); n != 3 {
		t.Errorf("%d changes, want those of the first apply: %s", n, strings.Join(f.changes, "; "))
	}
}

func TestNoIPVS(t *testing.T) {
	f := &fake{}
	loaded := false
	d := start(t, Options{open: func() (kernel, error) {
		if !loaded {
			return nil, errNoIPVS
		}
		return f.handle()
	}})
	want := vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1))
	held, err := d.Apply(t.Context(), []ravel.VirtualService{want})
	if err == nil || !strings.Contains(err.Error(), "modprobe ip_vs") || errors.Is(err, ErrUnknown) || len(held) > 0 {
		t.Fatalf("held %v, %v; want an error that names modprobe ip_vs", held, err)
	}
	if p := d.Problems(); len(p) != 1 || p[0].Fix != "modprobe ip_vs" {
		t.Errorf("problems %v", p)
	}
	if lines, err := d.Cleanup(t.Context(), false); err != nil || len(lines) > 0 {
		t.Errorf("cleanup without IPVS: %v, %v; want nothing to do", lines, err)
	}
	loaded = true
	apply(t, d, want)
	if p := d.Problems(); len(p) > 0 {
		t.Errorf("the problem stays: %v", p)
	}
}

// TestFaults has each fault keep the table of its service as it was, which is served on, and the others done.
func TestFaults(t *testing.T) {
	good, bad := vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)), vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1))
	change := func(f func(*ravel.VirtualService)) ravel.VirtualService { return with(bad, f) }
	for _, test := range []struct {
		name string
		v    ravel.VirtualService
		what string
	}{
		{"another family", vs("tcp 192.0.2.2:80", rs("2001:db8::1", 1)), "real server 2001:db8::1 is of another family than the service"},
		{"mapped", vs("tcp 192.0.2.2:80", rs("::ffff:10.0.0.1", 1)), "::ffff:10.0.0.1 is no address for a real server"},
		{"twice", vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1), rs("10.0.0.1", 2)), "real server 10.0.0.1 is in it twice"},
		{"weight", vs("tcp 192.0.2.2:80", rs("10.0.0.1", 65536)), "real server 10.0.0.1 has weight 65536, last weight 65536: want 0 to 65535"},
		{"no real server's address", vs("tcp 192.0.2.2:80", ravel.RealServer{Weight: 1}), "invalid IP is no address for a real server"},
		{"no scheduler", change(func(v *ravel.VirtualService) { v.Scheduler = "" }), `scheduler "": want the name of one`},
		{"none", change(func(v *ravel.VirtualService) { v.Scheduler = "none" }), `scheduler "none": want the name of one`},
		{"persistence", change(func(v *ravel.VirtualService) { v.Flags |= 1 }), "flags 0x19: want those of a scheduler only"},
		{"one packet of TCP", change(func(v *ravel.VirtualService) { v.OnePacket = true }), "one-packet scheduling is for udp"},
		{"thresholds of mh", limited(bad, 10, 5), "thresholds are not for mh: what this director counts would change what it picks, and no other director's pick"},
		{"thresholds turned round", limited(scheduled(bad, "wlc", 0), 5, 5), "thresholds 5 and 5: want 0 to 2147483647, and the upper one first"},
		{"a threshold below 0", limited(scheduled(bad, "wlc", 0), 5, -1), "thresholds 5 and -1: want 0 to 2147483647, and the upper one first"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := &fake{}
			d := start(t, Options{open: f.handle})
			apply(t, d, good, bad)
			k, _ := f.handle()
			before := dump(t, k)
			held, err := d.Apply(t.Context(), []ravel.VirtualService{test.v, good})
			if err != nil || !slices.Equal(held, []ravel.ServiceKey{bad.Key, good.Key}) {
				t.Errorf("held %v, %v; want both", held, err)
			}
			want := []ravel.Problem{{Where: "tcp 192.0.2.2:80", What: test.what + "; the service is left as it is in IPVS"}}
			if diff := cmp.Diff(want, d.Problems()); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(before, dump(t, k)); diff != "" {
				t.Errorf("table (-want +got):\n%s", diff)
			}
		})
	}
	for _, k := range []ravel.ServiceKey{
		{}, {VIP: netip.MustParseAddr("192.0.2.2"), Proto: ravel.TCP}, {VIP: netip.MustParseAddr("192.0.2.2"), Proto: 132, Port: 1},
		{VIP: netip.MustParseAddr("fe80::1%eth0"), Proto: ravel.TCP, Port: 1}, {VIP: netip.MustParseAddr("::ffff:1.2.3.4"), Proto: ravel.TCP, Port: 1},
	} {
		f := &fake{}
		d := start(t, Options{open: f.handle})
		held, err := d.Apply(t.Context(), []ravel.VirtualService{{Key: k, Scheduler: ravel.MH}, good, good})
		if err != nil || len(held) != 1 || len(d.Problems()) < 2 || len(f.services) != 1 {
			t.Errorf("%v: held %v, %v, problems %v", k, held, err, d.Problems())
		}
	}
}

// TestRefusedRealServer has the kernel refuse one: the rest of the service is done, but never to its ruin.
func TestRefusedRealServer(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k := opened(t, open)
		d := start(t, Options{open: open})
		apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.2", 1), rs("10.0.0.1", 1)))
		for range 2 {
			held, err := d.Apply(t.Context(), []ravel.VirtualService{vs("tcp 192.0.2.1:80", rs("224.0.0.1", 1)), vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1))})
			if !errors.Is(err, unix.EINVAL) || len(held) != 2 {
				t.Fatalf("held %v, %v; want both, and EINVAL", held, err)
			}
		}
		want := `-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 1
-A -t 192.0.2.2:80 -s mh -b mh-fallback,mh-port,flag-3
-a -t 192.0.2.2:80 -r 10.0.0.1:80 -g -w 1
`
		if diff := cmp.Diff(want, dump(t, k)); diff != "" {
			t.Errorf("table (-want +got):\n%s", diff)
		}
	})
}

// TestErrorsAreFew has the kernel refuse everything.
func TestErrorsAreFew(t *testing.T) {
	d := start(t, Options{open: (&fake{}).handle})
	var want []ravel.VirtualService
	for n := range 100 {
		v := vs(fmt.Sprintf("tcp 192.0.2.%d:80", n+1))
		for m := range 100 {
			v.RealServers = append(v.RealServers, rs(fmt.Sprintf("224.0.0.%d", m+1), 1))
		}
		want = append(want, v)
	}
	_, err := d.Apply(t.Context(), want)
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "and 95 more like these") || strings.Count(err.Error(), "\n") > 40 {
		t.Errorf("error of a hundred services:\n%v", err)
	}
}

func TestForwarding(t *testing.T) {
	f := &fake{}
	way := &plain{behind: []string{"10.1.0.1"}, nowhere: []string{"10.2.0.1"}, hostRoutes: newHostRoutes()}
	d := start(t, Options{open: f.handle, routes: way})
	auto := func(r ravel.RealServer) ravel.RealServer {
		r.Forwarding = ravel.Auto
		return r
	}
	want := []ravel.VirtualService{
		vs("tcp 192.0.2.1:80", auto(rs("10.0.0.1", 1)), auto(rs("10.1.0.1", 1)), auto(rs("10.2.0.1", 1))),
		vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1), rs("10.1.0.1", 1), tunnelled(rs("10.2.0.1", 1))),
		vs("tcp 192.0.2.3:80", rs("10.1.0.1", 1)),
	}
	apply(t, d, want...)
	k, _ := f.handle()
	table := func() string {
		var methods []string
		for line := range strings.Lines(dump(t, k)) {
			if fields := strings.Fields(line); fields[0] == "-a" {
				methods = append(methods, fields[5])
			}
		}
		return strings.Join(methods, " ")
	}
	if got := table(); got != "-g -i -i -g -g -i -g" {
		t.Errorf("forwarding %s", got)
	}
	if diff := cmp.Diff([]ravel.Problem{
		{Where: "real server 10.2.0.1", What: "cannot be reached: no route; forwarding stays tunnel", Fix: "ip route get 10.2.0.1"},
		{
			Where: "real server 10.1.0.1", What: "forwarding is direct, but it is behind a gateway: its packets go astray",
			Fix: "set its forwarding to tunnel or auto",
		},
	}, d.Problems()); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	calls := f.calls
	apply(t, d, want...)
	if f.calls != calls || len(d.Problems()) != 2 {
		t.Errorf("%d requests when applied again, problems %v; want none, and the same problems", f.calls-calls, d.Problems())
	}

	// The routes change: what was direct goes by tunnel and the other way round.
	way.behind, way.nowhere = []string{"10.0.0.1"}, nil
	d.reach.refresh(t.Context())
	select {
	case <-d.Changed():
	default:
		t.Error("a change of routes is not told")
	}
	apply(t, d, want...)
	if got := table(); got != "-i -g -g -g -g -i -g" {
		t.Errorf("forwarding %s after a change", got)
	}
	for _, behind := range [][]string{nil, {"10.0.0.1"}} {
		way.behind = behind
		d.reach.refresh(t.Context())
	}
	<-d.Changed()
	select {
	case <-d.Changed():
		t.Error("two changes are told twice")
	default:
	}
}

func TestSysctls(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "net/ipv4/vs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, value string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	for _, s := range settings {
		write(s.name, "7")
	}
	if err := os.Remove(filepath.Join(dir, "ignore_tunneled")); err != nil {
		t.Fatal(err)
	}
	f := &fake{}
	d := start(t, Options{open: f.handle, Sysctl: sysctl.New(root, "")})
	apply(t, d)
	for _, s := range settings {
		if s.name != "ignore_tunneled" && read(s.name) != s.value {
			t.Errorf("%s is %s, want %s", s.name, read(s.name), s.value)
		}
	}
	want := []ravel.Problem{{
		Where: "sysctl net/ipv4/vs/ignore_tunneled", What: "this kernel has it not; it should be 0", Fix: "use a kernel that has it",
	}}
	if diff := cmp.Diff(want, d.Problems()); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	write("ignore_tunneled", "1")
	write("sloppy_tcp", "0")
	d.Resync()
	apply(t, d)
	if read("sloppy_tcp") != "1" || read("ignore_tunneled") != "0" || len(d.Problems()) > 0 {
		t.Errorf("after a resync: sloppy_tcp %s, ignore_tunneled %s, problems %v", read("sloppy_tcp"), read("ignore_tunneled"), d.Problems())
	}

	apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)))
	status, err := d.Status(t.Context())
	if err != nil || len(status) != 1 || status[0].Counters != nil || status[0].Reals[0].Counters != nil {
		t.Errorf("status %+v, %v; want no counters where the kernel does not count", status, err)
	}
	d = start(t, Options{open: f.handle, Sysctl: sysctl.New(root, ""), CountPackets: true})
	apply(t, d)
	if read("run_estimation") != "1" {
		t.Error("the kernel does not count packets")
	}
}

func TestSysctlsOfTheKernel(t *testing.T) {
	nettest.Need(t, nettest.IPVS)
	flush(t)
	s := sysctl.New("/proc/sys", "")
	d := start(t, Options{Sysctl: s})
	apply(t, d)
	if p := d.Problems(); len(p) > 0 {
		t.Errorf("problems %v", p)
	}
	for _, setting := range settings {
		if v, err := s.Get("net/ipv4/vs/" + setting.name); err != nil || v != setting.value {
			t.Errorf("%s is %s, %v; want %s", setting.name, v, err, setting.value)
		}
	}
}

func TestMetricsAndDrift(t *testing.T) {
	f := &fake{}
	registry := prometheus.NewRegistry()
	var log bytes.Buffer
	d := start(t, Options{open: f.handle, Registerer: registry, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if _, err := New(Options{open: f.handle, routes: plain{}, Registerer: registry}); err == nil {
		t.Error("two directors with one registry")
	}
	apply(t, d, vs("tcp 192.0.2.1:80", rs("10.0.0.2", 1), rs("10.0.0.1", 1)), vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1)))
	k, _ := f.handle()
	i := id{ServiceKey: key("tcp 192.0.2.2:80")}
	if err := k.DelDestination(i.request(), real{at: addrPort("10.0.0.1", 80)}.destination()); err != nil {
		t.Fatal(err)
	}
	d.Resync()
	if held, err := d.Apply(t.Context(), []ravel.VirtualService{
		vs("tcp 192.0.2.1:80", rs("10.0.0.2", 1), rs("10.0.0.1", 1)),
		scheduled(vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1), rs("224.0.0.1", 1)), "nosuch", 0), // served on, but for one
		scheduled(vs("tcp 192.0.2.3:80", rs("10.0.0.1", 1)), "nosuch", 0),
	}); err == nil || len(held) != 2 {
		t.Fatalf("held %v, %v", held, err)
	}
	expect := `
# HELP ravel_ipvs_drift_total Services of ours that were found changed by somebody else when IPVS was read again.
# TYPE ravel_ipvs_drift_total counter
ravel_ipvs_drift_total 1
# HELP ravel_ipvs_operations_total Changes asked of IPVS; result says whether the kernel made them.
# TYPE ravel_ipvs_operations_total counter
ravel_ipvs_operations_total{operation="add-real-server",result="error"} 1
ravel_ipvs_operations_total{operation="add-real-server",result="ok"} 5
ravel_ipvs_operations_total{operation="add-service",result="ok"} 3
ravel_ipvs_operations_total{operation="edit-service",result="error"} 2
ravel_ipvs_operations_total{operation="edit-service",result="ok"} 2
# HELP ravel_ipvs_real_servers Real servers that were wanted at the last apply, over all services, and those of them in services that IPVS then served.
# TYPE ravel_ipvs_real_servers gauge
ravel_ipvs_real_servers{state="desired"} 5
ravel_ipvs_real_servers{state="held"} 3
# HELP ravel_ipvs_services Virtual services that were wanted at the last apply, and those of them that IPVS then served.
# TYPE ravel_ipvs_services gauge
ravel_ipvs_services{state="desired"} 3
ravel_ipvs_services{state="held"} 2
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(expect),
		"ravel_ipvs_services", "ravel_ipvs_real_servers", "ravel_ipvs_operations_total", "ravel_ipvs_drift_total"); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(registry, "ravel_ipvs_apply_duration_seconds", "ravel_ipvs_last_success_timestamp_seconds"); err != nil || n != 2 {
		t.Errorf("%d series, %v; want 2", n, err)
	}
	if !strings.Contains(log.String(), "IPVS was changed by somebody else") {
		t.Errorf("drift is not logged:\n%s", log.String())
	}
}

func TestStatusKeepsNames(t *testing.T) {
	f := &fake{}
	d := start(t, Options{open: f.handle})
	for _, name := range []string{"shop/web:http", "shop/www:http"} {
		apply(t, d, with(vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)), func(v *ravel.VirtualService) { v.Name = name }))
		status, err := d.Status(t.Context())
		if err != nil || len(status) != 1 || status[0].Name != name {
			t.Fatalf("status %+v, %v; want the name %s", status, err, name)
		}
	}
	if n := len(f.changes); n != 3 {
		t.Errorf("%d changes for a name, want those of a new service only: %s", n, fmt.Sprint(f.changes))
	}
}

// Where there can be no host route, a real server that has open flows is not forwarded to in another way until they
// have ended.
func TestForwardingChangesWithTheLastFlow(t *testing.T) {
	f := &fake{}
	way := &plain{hostRoutes: newHostRoutes()}
	way.fault = errTaken
	d := start(t, Options{open: f.handle, routes: way})
	byTunnel := vs("tcp 192.0.2.1:80", tunnelled(rs("10.0.0.1", 1)), tunnelled(rs("10.0.0.2", 1)))
	direct := vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1), rs("10.0.0.2", 1))
	k, _ := f.handle()
	flows := func(n int) {
		for _, s := range f.services {
			for _, r := range s.reals {
				if r.Address.String() == "10.0.0.1" {
					r.InactiveConnections = n
				}
			}
		}
	}
	step := func(what string, want ravel.VirtualService, tunnels, problems int) {
		t.Helper()
		d.Resync()
		apply(t, d, want)
		if got := strings.Count(dump(t, k), " -i "); got != tunnels || len(d.Problems()) != problems {
			t.Fatalf("%s: %d by tunnel, want %d; problems %v, want %d", what, got, tunnels, d.Problems(), problems)
		}
	}
	step("new", byTunnel, 2, 0)
	flows(1)
	step("to direct with a flow open", direct, 1, 1)
	flows(0)
	step("to direct without one", direct, 0, 0)
	flows(1)
	step("to tunnel with a flow open", byTunnel, 1, 1)
	way.behind = []string{"10.0.0.1"}
	d.reach.refresh(t.Context())
	step("to tunnel, no more on-link", byTunnel, 2, 0)
}

// A real server whose forwarding changes has a host route before it is edited, and keeps it until no service has it.
func TestHostRoutes(t *testing.T) {
	f := &fake{}
	way := &plain{hostRoutes: newHostRoutes(), behind: []string{"10.1.0.1"}}
	way.list[netip.MustParseAddr("10.0.0.9")] = true // of an earlier process
	d := start(t, Options{open: f.handle, routes: way})
	edited := 0
	f.changed = func() {
		if last := f.changes[len(f.changes)-1]; strings.HasPrefix(last, "set 10.0.0.") {
			edited++
			if list, _ := way.hosts(); len(list) == 0 {
				t.Errorf("edited without a host route: %s", last)
			}
		}
	}
	step := func(what string, want []string, services ...ravel.VirtualService) {
		t.Helper()
		d.Resync()
		apply(t, d, services...)
		var got []string
		list, _ := way.hosts()
		for _, a := range list {
			got = append(got, a.String())
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%s: host routes to %v, want %v", what, got, want)
		}
		if p := d.Problems(); len(p) > 0 {
			t.Fatalf("%s: %v", what, p)
		}
	}
	web := func(reals ...ravel.RealServer) ravel.VirtualService { return vs("tcp 192.0.2.1:80", reals...) }
	far := tunnelled(rs("10.1.0.1", 1))
	step("new", nil, web(tunnelled(rs("10.0.0.1", 1)), tunnelled(rs("10.0.0.2", 1)), far))
	step("one to direct", []string{"10.0.0.1"}, web(rs("10.0.0.1", 1), tunnelled(rs("10.0.0.2", 1)), far))
	step("and back, with another", []string{"10.0.0.1", "10.0.0.2"}, web(tunnelled(rs("10.0.0.1", 1)), rs("10.0.0.2", 1), far))
	if edited == 0 {
		t.Fatalf("no edits seen: %q", f.changes)
	}
	other := vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1))
	step("another service has it too", []string{"10.0.0.1", "10.0.0.2"}, web(rs("10.0.0.2", 1), far), other)
	step("one is gone", []string{"10.0.0.1"}, web(far), other)
	delete(way.list, netip.MustParseAddr("10.0.0.1")) // by somebody
	d.Resync()
	step("after a resync", []string{"10.0.0.1"}, web(far), other)
	lines, err := d.Cleanup(t.Context(), true)
	if err != nil || !slices.Contains(lines, "ip route delete 10.0.0.1 via 10.0.0.1 proto 82") || len(way.list) != 1 {
		t.Errorf("a dry run says %q, %v, and leaves %v", lines, err, way.list)
	}
	if _, err := d.Cleanup(t.Context(), false); err != nil || len(way.list) != 0 {
		t.Errorf("cleanup: %v, and leaves %v", err, way.list)
	}
}
