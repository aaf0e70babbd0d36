package guard

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mustApply guards VIPs, without an error and all of them.
func mustApply(t *testing.T, g *Guard, vips []netip.Addr, claims []ravel.ServiceKey) {
	t.Helper()
	guarded, err := g.Apply(context.Background(), vips, claims, nil)
	must(t, err)
	if want := sortedAddrs(vips); !slices.Equal(guarded, want) {
		t.Fatalf("guarded %v, want %v", guarded, want)
	}
}

// eachVariant runs a test with both variants of iptables, each in a network namespace of its own.
func eachVariant(t *testing.T, fn func(t *testing.T, tables []*iptables.Tables)) {
	features := map[iptables.Variant]nettest.Feature{iptables.NFT: nettest.NftNAT, iptables.Legacy: nettest.LegacyNAT}
	for _, v := range []iptables.Variant{iptables.NFT, iptables.Legacy} {
		t.Run(string(v), func(t *testing.T) {
			nettest.Need(t, nettest.IPSet, features[v])
			nettest.InNetns(t, func() { fn(t, open(t, v)) })
		})
	}
}

func open(t *testing.T, v iptables.Variant) []*iptables.Tables {
	var tables []*iptables.Tables
	for _, f := range []iptables.Family{iptables.V4, iptables.V6} {
		one, err := iptables.Open(v, f)
		must(t, err)
		tables = append(tables, one)
	}
	return tables
}

// in runs fn on a thread that is in the named network namespace, and waits for it.
func in(t *testing.T, name string, fn func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread goes
		ns, err := netns.GetFromName(name)
		if err == nil {
			err = netns.Set(ns)
			_ = ns.Close()
		}
		if err == nil {
			fn()
		}
		done <- err
	}()
	must(t, <-done)
}

var (
	vips  = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:2::1")}
	hosts = []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:1::1")}
)

// wire makes a client namespace beside this one, with routes to the VIPs, and puts these on lo.
func wire(t *testing.T) (client string) {
	client = fmt.Sprintf("client%d", rand.Uint32())
	nettest.Shell(t, fmt.Sprintf(`
		ip link set lo up
		ip netns add %[1]s
		ip link add wire0 type veth peer name wire0 netns %[1]s
		ip addr add 198.51.100.1/24 dev wire0
		ip addr add 2001:db8:1::1/64 dev wire0 nodad
		ip addr add 192.0.2.1/32 dev lo
		ip addr add 2001:db8:2::1/128 dev lo
		ip link set wire0 up
		ip -n %[1]s addr add 198.51.100.2/24 dev wire0
		ip -n %[1]s addr add 2001:db8:1::2/64 dev wire0 nodad
		ip -n %[1]s link set lo up
		ip -n %[1]s link set wire0 up
		ip -n %[1]s route add 192.0.2.0/24 via 198.51.100.1
		ip -n %[1]s route add 2001:db8:2::/64 via 2001:db8:1::1`, client))
	t.Cleanup(func() { nettest.Run(t, "ip", "netns", "del", client) })
	return client
}

const port = 2222

// listen starts an echo on all addresses, by TCP and UDP, and counts what reaches it. With VIPs and hosts given it
// listens on each of these by UDP, since a socket on the wildcard would answer from the wrong address.
func listen(t *testing.T, each ...netip.Addr) *atomic.Int64 {
	t.Helper()
	return listenAt(t, port, each...)
}

func listenAt(t *testing.T, port uint16, each ...netip.Addr) *atomic.Int64 {
	t.Helper()
	var seen atomic.Int64
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
	must(t, err)
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait) // after the sockets are closed
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			seen.Add(1)
			_ = c.Close()
		}
	})
	if each == nil {
		each = []netip.Addr{netip.IPv6Unspecified()}
	}
	for _, a := range each {
		u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, port)))
		must(t, err)
		t.Cleanup(func() { _ = u.Close() })
		wg.Go(func() {
			b := make([]byte, 100)
			for {
				n, from, err := u.ReadFromUDP(b)
				if err != nil {
					return
				}
				seen.Add(1)
				_, _ = u.WriteToUDP(b[:n], from)
			}
		})
	}
	t.Cleanup(func() { _ = l.Close() })
	return &seen
}

// ask asks the echo at an address from this thread's namespace.
func ask(proto string, to netip.Addr, port uint16) error {
	c, err := net.DialTimeout(proto, netip.AddrPortFrom(to, port).String(), 2*time.Second)
	if err != nil || proto == "tcp" {
		if err == nil {
			_ = c.Close()
		}
		return err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 10))
	return err
}

func key(proto ravel.Proto, vip netip.Addr, port uint16) ravel.ServiceKey {
	return ravel.ServiceKey{VIP: vip, Proto: proto, Port: port}
}

// saved returns all rules and sets of this namespace.
func saved(t *testing.T, tables []*iptables.Tables) string {
	var all []string
	for _, one := range tables {
		lines, err := one.Save(t.Context(), "filter")
		must(t, err)
		for _, l := range lines {
			if strings.HasPrefix(l, "-A ") {
				all = append(all, l)
			}
		}
	}
	return strings.Join(all, "\n") + "\n" + nettest.Run(t, "ipset", "list", "-n")
}

func TestAVIPIsNoDoor(t *testing.T) {
	eachVariant(t, func(t *testing.T, tables []*iptables.Tables) {
		client := wire(t)
		listen(t, slices.Concat(vips, hosts)...)
		for i, command := range []string{"iptables", "ip6tables"} {
			name := command + "-" + string(tables[i].Variant())
			nettest.Run(t, name, "-A", "INPUT", "-p", "tcp", "--dport", "9", "-j", "DROP")
			nettest.Run(t, name, "-A", "FORWARD", "-p", "tcp", "--dport", "9", "-j", "DROP")
		}
		nettest.Run(t, "ipset", "create", "foreign", "hash:ip")
		before := saved(t, tables)
		expect := func(what string, want error, proto string, to netip.Addr) {
			t.Helper()
			var err error
			start := time.Now()
			in(t, client, func() { err = ask(proto, to, port) })
			if !errors.Is(err, want) {
				t.Fatalf("%s: %s to %s: got %v, want %v", what, proto, to, err, want)
			}
			if took := time.Since(start); took > 1500*time.Millisecond {
				t.Fatalf("%s: %s to %s: the answer took %s", what, proto, to, took)
			}
		}
		g := New(Options{Tables: tables, Enabled: true})
		for i, vip := range vips {
			expect("before", nil, "tcp", vip)
			expect("before", nil, "udp", vip)
			expect("before", nil, "tcp", hosts[i])
		}
		mustApply(t, g, vips, nil)
		for i, vip := range vips {
			expect("guarded", syscall.ECONNREFUSED, "tcp", vip)
			expect("guarded", syscall.ECONNREFUSED, "udp", vip)
			expect("the host's own", nil, "tcp", hosts[i])
			expect("the host's own", nil, "udp", hosts[i])
			nettest.Run(t, "ip", "netns", "exec", client, "ping", "-n", "-c1", "-W2", vip.String())
		}
		mustApply(t, g, vips, []ravel.ServiceKey{key(ravel.TCP, vips[0], port), key(ravel.TCP, vips[1], port)})
		for _, vip := range vips {
			expect("claimed for TCP", nil, "tcp", vip)
			expect("claimed for TCP", syscall.ECONNREFUSED, "udp", vip)
		}
		mustApply(t, g, vips[:1], []ravel.ServiceKey{key(ravel.UDP, vips[0], port)})
		expect("claimed for UDP", syscall.ECONNREFUSED, "tcp", vips[0])
		expect("claimed for UDP", nil, "udp", vips[0])
		expect("no VIP of ours any more", nil, "tcp", vips[1])

		would, err := g.Cleanup(t.Context(), true)
		must(t, err)
		did, err := g.Cleanup(t.Context(), false)
		must(t, err)
		if len(did) != 10 || !slices.Equal(would, did) {
			t.Fatalf("would do %q, did %q", would, did)
		}
		if diff := cmp.Diff(before, saved(t, tables)); diff != "" {
			t.Fatalf("rules and sets after cleanup (-want +got):\n%s", diff)
		}
		expect("after cleanup", nil, "tcp", vips[0])
	})
}

func TestResync(t *testing.T) {
	eachVariant(t, func(t *testing.T, tables []*iptables.Tables) {
		r := prometheus.NewPedanticRegistry()
		g := New(Options{Tables: tables, Enabled: true, Registerer: r})
		claim := []ravel.ServiceKey{key(ravel.TCP, vips[0], 80), key(ravel.UDP, vips[1], 53)}
		apply := func() {
			t.Helper()
			g.Resync()
			mustApply(t, g, vips, claim)
		}
		apply()
		want := saved(t, tables)
		apply()
		if drift := testutil.ToFloat64(g.metrics.drift.WithLabelValues("rule")); drift != 0 {
			t.Fatalf("nobody changed a rule, and drift is %v", drift)
		}
		foreign := []string{"-p", "tcp", "--dport", "22", "-j", "ACCEPT"}
		for i, command := range []string{"iptables", "ip6tables"} {
			name := command + "-" + string(tables[i].Variant())
			nettest.Run(t, name, append([]string{"-I", "INPUT"}, foreign...)...)
			nettest.Run(t, name, "-F", chain)
		}
		nettest.Run(t, "ipset", "flush", "ravel4-vip")
		nettest.Run(t, "ipset", "add", "ravel4-svc", "192.0.2.9,tcp:22")
		apply()
		for i, command := range []string{"iptables", "ip6tables"} {
			name := command + "-" + string(tables[i].Variant())
			rules := nettest.Run(t, name, "-S", "INPUT")
			if lines := strings.Split(rules, "\n"); len(lines) != 4 || !strings.HasSuffix(lines[1], "-j "+chain) {
				t.Fatalf("our jump is not first, or not alone:\n%s", rules)
			}
			nettest.Run(t, name, append([]string{"-D", "INPUT"}, foreign...)...)
		}
		if diff := cmp.Diff(want, saved(t, tables)); diff != "" {
			t.Fatalf("rules (-want +got):\n%s", diff)
		}
		metrics := `
			# HELP ravel_guard_drift_total Set entries (entry) and times that rules (rule) were changed by somebody else, as found on re-reading.
			# TYPE ravel_guard_drift_total counter
			ravel_guard_drift_total{kind="entry"} 2
			ravel_guard_drift_total{kind="rule"} 2
			# HELP ravel_guard_entries VIPs that the guard's sets hold (vip) and services whose packets it lets pass (claim). It does not say that the rule that reads them is in place.
			# TYPE ravel_guard_entries gauge
			ravel_guard_entries{kind="claim"} 2
			ravel_guard_entries{kind="vip"} 2
		`
		if err := testutil.GatherAndCompare(r, strings.NewReader(metrics)); err != nil {
			t.Fatal(err)
		}
		// A process that starts anew takes over what is there, and ends the holds of the one before.
		if _, err := g.HoldBack(claim[0]); err != nil {
			t.Fatal(err)
		}
		again := New(Options{Tables: tables, Enabled: true})
		mustApply(t, again, vips, claim)
		held, _, err := again.sets.list(again.families[0].hold)
		must(t, err)
		if len(held) != 0 {
			t.Fatalf("held by a process that is gone: %v", held)
		}
		if diff := cmp.Diff(want, saved(t, tables)); diff != "" {
			t.Fatalf("rules after a restart (-want +got):\n%s", diff)
		}
		off := New(Options{Tables: tables})
		mustApply(t, off, vips, claim)
		if got := strings.TrimSpace(saved(t, tables)); got != "" {
			t.Fatalf("switched off, and left: %s", got)
		}
	})
}

// While VIPs and services come and go, and addresses with them, no packet for a VIP reaches a socket of the host.
func TestNoMomentIsOpen(t *testing.T) {
	eachVariant(t, func(t *testing.T, tables []*iptables.Tables) {
		client := wire(t)
		nettest.Shell(t, "ip addr del 192.0.2.1/32 dev lo; ip addr del 2001:db8:2::1/128 dev lo")
		seen := listen(t)
		g := New(Options{Tables: tables, Enabled: true})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var wg sync.WaitGroup
		var refused [2]atomic.Int64
		for i, vip := range vips {
			wg.Go(func() {
				in(t, client, func() {
					for ctx.Err() == nil {
						for _, proto := range []string{"tcp", "udp"} {
							c, err := net.DialTimeout(proto, netip.AddrPortFrom(vip, port).String(), 30*time.Millisecond)
							if err == nil && proto == "udp" {
								_ = c.SetDeadline(time.Now().Add(30 * time.Millisecond))
								_, _ = c.Write([]byte("hello"))
								_, err = c.Read(make([]byte, 10))
							}
							if errors.Is(err, syscall.ECONNREFUSED) {
								refused[i].Add(1)
							}
							if c != nil {
								_ = c.Close()
							}
						}
					}
				})
			})
		}
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		others := []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8:2::7")}
		for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
			var claims []ravel.ServiceKey
			for p := range 20 {
				if rng.IntN(2) == 0 {
					claims = append(claims, key(ravel.TCP, vips[p%2], uint16(3000+p)))
				}
			}
			mustApply(t, g, append(slices.Clone(vips), others[:rng.IntN(3)]...), claims)
			nettest.Shell(t, "ip addr add 192.0.2.1/32 dev lo; ip addr add 2001:db8:2::1/128 dev lo")
			for range 5 {
				if rng.IntN(3) == 0 {
					g.Resync()
				}
				mustApply(t, g, append(slices.Clone(vips), others[:rng.IntN(3)]...), claims[:rng.IntN(len(claims)+1)])
			}
			nettest.Shell(t, "ip addr del 192.0.2.1/32 dev lo; ip addr del 2001:db8:2::1/128 dev lo")
			mustApply(t, g, others[:rng.IntN(3)], nil)
		}
		cancel()
		wg.Wait()
		if n := seen.Load(); n != 0 {
			t.Fatalf("%d packets reached the host's sockets", n)
		}
		if refused[0].Load() < 3 || refused[1].Load() < 3 {
			t.Fatalf("refused only %d and %d times: the test shows nothing", refused[0].Load(), refused[1].Load())
		}
		t.Logf("refused %d times by IPv4, %d by IPv6", refused[0].Load(), refused[1].Load())
	})
}

var errInjected = errors.New("injected")

// flaky are the kernel's sets, of which the nth change fails.
type flaky struct {
	sets
	failAt int
}

func (k *flaky) fails() bool {
	if k.failAt == 0 {
		return false
	}
	k.failAt--
	return k.failAt == 0
}

func (k *flaky) add(s set, e ravel.ServiceKey) error {
	if k.fails() {
		return errInjected
	}
	return k.sets.add(s, e)
}

func (k *flaky) del(s set, e ravel.ServiceKey) error {
	if k.fails() {
		return errInjected
	}
	return k.sets.del(s, e)
}

func (k *flaky) create(s set) error {
	if k.fails() {
		return errInjected
	}
	return k.sets.create(s)
}

// Any state leads to any other, also after faults: an Apply without an error means that the sets are what is wanted.
func TestRandomWalk(t *testing.T) {
	eachVariant(t, func(t *testing.T, tables []*iptables.Tables) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		g := New(Options{Tables: tables, Enabled: true})
		k := &flaky{sets: g.sets}
		g.sets = k
		steps := 60
		if !nettest.Has(nettest.PlainClock) {
			steps = 20
		}
		for range steps {
			var addrs []netip.Addr
			var claims []ravel.ServiceKey
			for n := range 8 {
				a := netip.AddrFrom4([4]byte{192, 0, 2, byte(n)})
				if n%2 == 0 {
					a = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: byte(n)})
				}
				if rng.IntN(2) == 0 {
					addrs = append(addrs, a)
				}
				for _, p := range []ravel.Proto{ravel.TCP, ravel.UDP} {
					if rng.IntN(3) == 0 {
						claims = append(claims, key(p, a, uint16(1+rng.IntN(2)*65534)))
					}
				}
			}
			if rng.IntN(2) == 0 {
				k.failAt = 1 + rng.IntN(10)
			}
			if rng.IntN(10) == 0 {
				g.Resync()
			}
			_, err := g.Apply(t.Context(), addrs, claims, nil)
			if (err != nil) != (len(g.Problems()) > 0) {
				t.Fatalf("error %v, problems %v", err, g.Problems())
			}
			k.failAt = 0
			if err != nil {
				mustApply(t, g, addrs, claims)
			}
			var haveVIPs, haveClaims []string
			for _, f := range g.families {
				for list, s := range map[*[]string]set{&haveVIPs: f.vip, &haveClaims: f.svc} {
					entries, _, err := g.sets.list(s)
					must(t, err)
					for _, e := range entries {
						*list = append(*list, keyText(e))
					}
				}
			}
			var wantVIPs, wantClaims []string
			for _, a := range addrs {
				wantVIPs = append(wantVIPs, a.String())
			}
			for _, c := range claims {
				wantClaims = append(wantClaims, c.String())
			}
			for _, list := range [][]string{haveVIPs, haveClaims, wantVIPs, wantClaims} {
				slices.Sort(list)
			}
			if diff := cmp.Diff([][]string{wantVIPs, wantClaims}, [][]string{haveVIPs, haveClaims}); diff != "" {
				t.Fatalf("sets (-want +got):\n%s", diff)
			}
		}
	})
}

func TestSetThatIsNotOurs(t *testing.T) {
	eachVariant(t, func(t *testing.T, tables []*iptables.Tables) {
		nettest.Run(t, "ipset", "create", "ravel4-vip", "hash:net")
		g := New(Options{Tables: tables, Enabled: true})
		guarded, err := g.Apply(t.Context(), vips, nil, nil)
		if err == nil || !strings.Contains(err.Error(), "ravel4-vip") || len(g.Problems()) != 1 {
			t.Fatalf("error %v, problems %v", err, g.Problems())
		}
		if !slices.Equal(guarded, vips[1:]) {
			t.Fatalf("guarded %v, want only IPv6's", guarded)
		}
		// The other family is guarded all the same.
		rules, err := tables[1].Rules(t.Context(), table, hook)
		must(t, err)
		if len(rules) != 1 {
			t.Fatalf("IPv6 is not guarded: %q", rules)
		}
		alone := New(Options{Tables: tables[1:], Enabled: true})
		// A family without tables is nothing that trying again would mend.
		for _, want := range [][]netip.Addr{vips, vips[:1], vips[1:]} {
			guarded, err = alone.Apply(t.Context(), want, nil, nil)
			must(t, err)
			missing := len(want) > 0 && want[0] == vips[0]
			if slices.Contains(guarded, vips[0]) || slices.Contains(guarded, vips[1]) != slices.Contains(want, vips[1]) ||
				(len(alone.Problems()) == 1) != missing {
				t.Fatalf("no tables for IPv4: of %v guarded %v, problems %v", want, guarded, alone.Problems())
			}
		}
	})
}

func TestHoldBackWithoutGuard(t *testing.T) {
	release, err := New(Options{}).HoldBack(key(ravel.TCP, vips[0], 80))
	must(t, err)
	release()
	release, err = New(Options{Enabled: true}).HoldBack(key(ravel.TCP, vips[0], 80))
	if err == nil {
		t.Fatal("held back where nothing is guarded")
	}
	release()
}

// The library panics on an error that is no errno; the door makes an error of it.
func TestDoor(t *testing.T) {
	err := door(func() error { return errors.New("").(syscall.Errno) })
	if err == nil || !strings.Contains(err.Error(), "interface conversion") {
		t.Fatalf("got %v", err)
	}
}

// BenchmarkApply changes one of 5,000 claims in the real kernel.
func BenchmarkApply(b *testing.B) {
	nettest.Need(b, nettest.IPSet)
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	v, err := iptables.Detect(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	four, err := iptables.Open(v, iptables.V4)
	if err != nil {
		b.Fatal(err)
	}
	g := New(Options{Tables: []*iptables.Tables{four}, Enabled: true})
	g.sets = ipset{&netlink.Handle{}}
	var claims []ravel.ServiceKey
	for p := range 5000 {
		claims = append(claims, key(ravel.TCP, vips[0], uint16(1+p)))
	}
	for n := 0; b.Loop(); n++ {
		if _, err := g.Apply(b.Context(), vips[:1], claims[n%2:], nil); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	if _, err := g.Cleanup(b.Context(), false); err != nil {
		b.Fatal(err)
	}
}

func TestLeads(t *testing.T) {
	const jump = "-A INPUT -m set --match-set ravel4-vip dst -j RAVEL-GUARD"
	f := &family{tables: &iptables.Tables{}, vip: set{name: "ravel4-vip"}}
	for _, test := range []struct {
		name  string
		rules []string
		want  bool
	}{
		{"first", []string{jump, "-A INPUT -j DROP"}, true},
		{"behind a realserver's own jump", []string{"-A INPUT -j RAVEL-OUTER", jump}, true},
		{"behind another's rule", []string{"-A INPUT -j ACCEPT", jump}, false},
		{"behind another's rule and a jump of ours", []string{"-A INPUT -j RAVEL-OUTER", "-A INPUT -j KUBE-FIREWALL", jump}, false},
		{"twice", []string{jump, jump}, false},
		{"an older jump of ours in front", []string{"-A INPUT -j RAVEL-GUARD", jump}, false},
		{"gone", []string{"-A INPUT -j RAVEL-OUTER"}, false},
		{"no rules", nil, false},
	} {
		if got := f.guarding().leads(test.rules); got != test.want {
			t.Errorf("%s: leads is %v, want %v", test.name, got, test.want)
		}
	}
}
