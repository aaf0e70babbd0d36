package realserver

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/sysctl"
)

// fakeOptions returns a Realserver with a /proc/sys of plain files, and its root.
func fakeOptions(t testing.TB, o Options) (*Realserver, string) {
	t.Helper()
	root := t.TempDir()
	for name, value := range map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv4/conf/tunl0/rp_filter": "1",
		"net/netfilter/nf_conntrack_tcp_be_liberal": "0"} {
		file := filepath.Join(root, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	o.Sysctl = sysctl.New(root, "")
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return r, root
}

func TestNewNamesEveryFault(t *testing.T) {
	_, err := New(Options{Chain: "KUBE", Mark: 3, MTU: 100, NoMasquerade: []netip.Prefix{{}}})
	for _, part := range []string{"KUBE", "sysctl", "0x3", "mtu 100", "no network"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("error %v does not name %q", err, part)
		}
	}
	if _, err := New(Options{Sysctl: sysctl.New("/proc/sys", ""), Mark: 0x4000}); err == nil {
		t.Error("one bit for two marks was taken")
	}
}

// apply∘apply = apply, and only what changes is written.
func TestApplyWritesTheDifference(t *testing.T) {
	r, tables, _ := fakeReal(t)
	all := append(everyKind(0, 1), redirect(ravel.TCP, vip4, 443, 2))
	apply(t, r, all...)
	apply(t, r, all...)
	if n := len(tables[0].restores) + len(tables[1].restores); n != 2 {
		t.Fatalf("%d transactions, want one a family", n)
	}
	all[0].Pods = all[0].Pods[1:]
	apply(t, r, all...)
	want := "*nat\n:RAVEL-SVC-SE4WLJXNRS6S - [0:0]\n" +
		"-A RAVEL-SVC-SE4WLJXNRS6S -j CONNMARK --set-xmark 0x1000/0x1000\n" +
		"-A RAVEL-SVC-SE4WLJXNRS6S -p tcp -j DNAT --to-destination 10.2.2.2:8080\nCOMMIT\n"
	if got := tables[0].restores[1:]; !slices.Equal(got, []string{want}) {
		t.Errorf("a pod went: transactions %q, want %q", got, want)
	}
	if len(tables[1].restores) != 1 {
		t.Errorf("the other family was written: %q", tables[1].restores[1:])
	}
}

// A family with nothing wanted and nothing there is not touched; one that loses its last redirect keeps what its open
// flows need.
func TestEmptyFamily(t *testing.T) {
	r, tables, _ := fakeReal(t)
	apply(t, r)
	apply(t, r, redirect(ravel.TCP, vip4, 80, 0))
	if len(tables[1].restores) != 0 {
		t.Errorf("IPv6 was written: %q", tables[1].restores)
	}
	apply(t, r)
	if got, want := len(tables[0].tables["nat"]), 5; got != want { // the kernel's four and RAVEL
		t.Errorf("%d chains of nat, want %d: %v", got, want, tables[0].tables["nat"])
	}
	if !slices.Equal(tables[0].tables["filter"]["FORWARD"], []string{"-j RAVEL-FORWARD"}) {
		t.Error("open flows are no longer let through")
	}
}

// Whatever call fails, Apply says so, says truly what is held, and the next one makes up for it.
func TestFailures(t *testing.T) {
	for n := 1; n < 20; n++ {
		r, tables, _ := fakeReal(t)
		before, after := redirect(ravel.TCP, vip4, 80, 0), redirect(ravel.TCP, vip4, 81, 0)
		changed := redirect(ravel.TCP, vip4, 80, 1)
		apply(t, r, before)
		if n%2 == 0 {
			r.Resync()
		}
		tables[0].failNext = n
		held, err := r.Apply(t.Context(), []ravel.Redirect{changed, after, redirect(ravel.TCP, vip6, 80, 0)}, nil)
		if tables[0].failNext > 0 {
			continue // there was no nth call
		}
		if !errors.Is(err, errFake) {
			t.Fatalf("call %d: error %v", n, err)
		}
		found := redirectsIn(tables[0].tables["nat"], r.names)
		for _, key := range held {
			if key.VIP.Is4() && len(found[key]) == 0 {
				t.Errorf("call %d: %s is held, it says, but has no rule", n, key)
			}
		}
		if !slices.Contains(held, ravel.ServiceKey{VIP: vip6, Proto: ravel.TCP, Port: 80}) {
			t.Errorf("call %d: the other family was not brought up", n)
		}
		apply(t, r, changed, after)
		if got := redirectsIn(tables[0].tables["nat"], r.names); len(got) != 2 || got[changed.Key][0] != changed.Pods[0] {
			t.Errorf("call %d: afterwards %v", n, got)
		}
	}
}

func TestProblems(t *testing.T) {
	where := func(r *Realserver) string {
		var all []string
		for _, p := range r.Problems() {
			all = append(all, p.String())
		}
		return strings.Join(all, "\n")
	}
	t.Run("redirects", func(t *testing.T) {
		r, tables, _ := fakeReal(t)
		mixed := redirect(ravel.TCP, vip4, 80, 0)
		mixed.Pods = append(mixed.Pods, netip.AddrPortFrom(pod(0, vip6), 80))
		good := redirect(ravel.TCP, vip4, 82, 0)
		held, err := r.Apply(t.Context(), []ravel.Redirect{
			mixed, good, good, redirect(ravel.TCP, vip4, 0, 0), redirect(9, vip4, 83, 0), redirect(ravel.TCP, netip.Addr{}, 83, 0),
			redirect(ravel.TCP, netip.MustParseAddr("::ffff:192.0.2.1"), 83), redirect(ravel.TCP, vip6, 84, 0),
		}, nil)
		if err != nil || len(held) != 2 || len(r.Problems()) != 6 {
			t.Errorf("held %v, %v, problems:\n%s", held, err, where(r))
		}
		if n := len(redirectsIn(tables[0].tables["nat"], r.names)); n != 1 {
			t.Errorf("%d redirects of IPv4, want 1", n)
		}
	})
	t.Run("no tables", func(t *testing.T) {
		r, _ := fakeOptions(t, Options{})
		held, err := r.Apply(t.Context(), everyKind(0), nil)
		if err != nil || len(held) != 0 || strings.Count(where(r), "no iptables") != 4 {
			t.Errorf("held %v, %v, problems:\n%s", held, err, where(r))
		}
	})
	t.Run("a director that is not on-link", func(t *testing.T) {
		r, _, n := fakeReal(t)
		n.routes = map[netip.Addr]route{client4: {link: "eth7", mtu: 1500}}
		x := redirect(ravel.TCP, vip4, 80, 0)
		apply(t, r, x)
		if got := where(r); !strings.Contains(got, "director 10.1.0.2: is not on-link") || !strings.Contains(got, "eth7") {
			t.Errorf("problems: %s", got)
		}
		x.Tunnelled = true
		apply(t, r, x)
		if got := where(r); got != "" {
			t.Errorf("with a tunnel: %s", got)
		}
	})
	t.Run("no tunnel device", func(t *testing.T) {
		r, _, n := fakeReal(t)
		n.tunnel = errors.New("operation not supported")
		x, y := redirect(ravel.TCP, vip4, 80, 0), redirect(ravel.TCP, vip4, 81, 0)
		x.Tunnelled = true
		held, err := r.Apply(t.Context(), []ravel.Redirect{x, y}, nil)
		if err != nil || !slices.Equal(held, []ravel.ServiceKey{y.Key}) || !strings.Contains(where(r), "modprobe ipip") || n.up["tunl0"] {
			t.Errorf("held %v, %v, problems: %s", held, err, where(r))
		}
	})
	t.Run("a tunnel device of an overlay", func(t *testing.T) {
		r, tables, n := fakeReal(t)
		x := redirect(ravel.TCP, vip4, 80, 0)
		x.Tunnelled = true
		decap := func() string { return strings.Join(tables[0].tables["mangle"][r.names.decap], "\n") }
		const strict = "-g RAVEL-KNOWN"
		apply(t, r, x)
		if got := where(r); got != "" || decap() != strict {
			t.Errorf("of our own: problems %s, rules %s", got, decap())
		}
		n.sharedErr = errFake // not known: as it was
		apply(t, r, x)
		if got := where(r); !strings.Contains(got, "not known") || decap() != strict {
			t.Errorf("strict and not known: problems %s, rules %s", got, decap())
		}
		n.shared, n.sharedErr = true, nil
		apply(t, r, x)
		if got := where(r); !strings.Contains(got, "link tunl0: serves somebody else") || !strings.HasPrefix(decap(), "-d 192.0.2.1/32 ") {
			t.Errorf("shared: problems %s, rules %s", got, decap())
		}
		n.sharedErr = errFake
		apply(t, r, x)
		if got := where(r); !strings.Contains(got, "not known") || !strings.HasPrefix(decap(), "-d 192.0.2.1/32 ") {
			t.Errorf("shared and not known: problems %s, rules %s", got, decap())
		}
		n.shared, n.sharedErr = false, nil
		apply(t, r, x)
		if got := where(r); got != "" || decap() != strict {
			t.Errorf("of our own again: problems %s, rules %s", got, decap())
		}
	})
	t.Run("no forwarding", func(t *testing.T) {
		r, _, _ := fakeReal(t)
		other, root := fakeOptions(t, Options{})
		r.sysctl = other.sysctl
		if err := os.WriteFile(filepath.Join(root, "net/ipv4/ip_forward"), []byte("0\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		apply(t, r, redirect(ravel.TCP, vip4, 80, 0))
		if got := where(r); !strings.Contains(got, "sysctl -w net.ipv4.ip_forward=1") {
			t.Errorf("problems: %s", got)
		}
	})
}

// A packet out of its window must not make the node reset a flow that it redirects.
func TestConntrackIsLiberal(t *testing.T) {
	const name = "net/netfilter/nf_conntrack_tcp_be_liberal"
	r, _, _ := fakeReal(t)
	apply(t, r, redirect(ravel.UDP, vip4, 80, 0))
	if got, _ := r.sysctl.Get(name); got != "0" {
		t.Errorf("set for UDP alone: %q", got)
	}
	apply(t, r, redirect(ravel.TCP, vip4, 80, 0))
	if got, _ := r.sysctl.Get(name); got != "1" {
		t.Errorf("is %q, want 1", got)
	}
	r.sysctl = sysctl.New(t.TempDir(), "")
	apply(t, r, redirect(ravel.TCP, vip4, 81, 0))
	if !slices.ContainsFunc(r.Problems(), func(p ravel.Problem) bool { return strings.Contains(p.Where, "be_liberal") }) {
		t.Errorf("no problem says that it cannot be set: %v", r.Problems())
	}
}

// rp_filter is loosened on tunl0 alone.
func TestTunnelSysctl(t *testing.T) {
	r, _, n := fakeReal(t)
	x, y := redirect(ravel.TCP, vip4, 80, 0), redirect(ravel.TCP, vip6, 80, 0)
	apply(t, r, x, y)
	if len(n.up) > 0 {
		t.Errorf("devices came up unasked: %v", n.up)
	}
	x.Tunnelled, y.Tunnelled = true, true
	apply(t, r, x, y)
	if got, err := r.sysctl.Get("net/ipv4/conf/tunl0/rp_filter"); got != "2" || err != nil {
		t.Errorf("rp_filter of tunl0 is %q, %v", got, err)
	}
	if !n.up["tunl0"] || !n.up["ip6tnl0"] {
		t.Errorf("devices are %v", n.up)
	}
	// Flows that came by it go on when nothing new does.
	x.Tunnelled, y.Tunnelled = false, false
	apply(t, r, x, y)
	if !n.up["tunl0"] || len(r.families[0].have["mangle"]) == 0 {
		t.Error("the tunnel is gone under its flows")
	}
}

// Conntrack is looked through when a UDP redirect loses a pod or begins, and again if that failed; at no other time.
func TestForget(t *testing.T) {
	r, _, n := fakeReal(t)
	key := ravel.ServiceKey{VIP: vip4, Proto: ravel.UDP, Port: 53}
	other := ravel.ServiceKey{VIP: vip4, Proto: ravel.UDP, Port: 54}
	one, two := redirect(ravel.UDP, vip4, 53, 0), redirect(ravel.UDP, vip4, 53, 0, 1)
	at := func(i int) netip.AddrPort { return netip.AddrPortFrom(pod(i, vip4), 8080) }
	self := netip.AddrPortFrom(vip4, 53)
	for _, tt := range []struct {
		name  string
		fail  error
		apply []ravel.Redirect
		flows []netip.AddrPort
		left  []netip.AddrPort
		looks int
	}{
		{name: "begins", apply: []ravel.Redirect{two}, flows: []netip.AddrPort{self, at(0), at(7)}, left: []netip.AddrPort{at(0)}, looks: 1},
		{name: "same", apply: []ravel.Redirect{two}, flows: []netip.AddrPort{at(0), at(1)}, left: []netip.AddrPort{at(0), at(1)}},
		{name: "pod gone, failing", fail: errFake, apply: []ravel.Redirect{one}, flows: []netip.AddrPort{at(0), at(1)}, left: []netip.AddrPort{at(0), at(1)}, looks: 1},
		{name: "pod gone, again", apply: []ravel.Redirect{one}, flows: []netip.AddrPort{at(0), at(1)}, left: []netip.AddrPort{at(0)}, looks: 1},
		{name: "pod comes", apply: []ravel.Redirect{two}, flows: []netip.AddrPort{at(0)}, left: []netip.AddrPort{at(0)}},
		{name: "ends", flows: []netip.AddrPort{at(0), at(1)}, left: []netip.AddrPort{}, looks: 1},
	} {
		n.fail, n.deletes = tt.fail, 0
		n.flows[key], n.flows[other] = tt.flows, []netip.AddrPort{at(5)}
		if _, err := r.Apply(t.Context(), tt.apply, nil); !errors.Is(err, tt.fail) {
			t.Errorf("%s: error %v, want %v", tt.name, err, tt.fail)
		}
		if !slices.Equal(n.flows[key], tt.left) || n.deletes != tt.looks {
			t.Errorf("%s: left %v after %d looks, want %v after %d", tt.name, n.flows[key], n.deletes, tt.left, tt.looks)
		}
		if len(n.flows[other]) != 1 {
			t.Fatalf("%s: flows of others went", tt.name)
		}
	}
}

// The fake kernel and the real ones hold the same after the same steps.
func TestConformance(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		t.Logf("-seed %d", *seed)
		rng := rand.New(rand.NewPCG(*seed, 3))
		fake, fakes, _ := fakeReal(t)
		kernel := newReal(t, v, nil)
		for step := range 12 {
			want := randomRedirects(rng, 3, nil)
			apply(t, fake, want...)
			apply(t, kernel, want...)
			for i, f := range kernel.families {
				for _, table := range tableOrder {
					ours := func(chain string) bool { return fake.names.ours(table, chain) }
					inReal, err := f.tables.Save(t.Context(), table)
					if err != nil {
						t.Fatal(err)
					}
					inFake, err := fakes[i].Save(t.Context(), table)
					if err != nil {
						t.Fatal(err)
					}
					got, want := text(ruleset{table: parseSaved(inReal, ours)}), text(ruleset{table: parseSaved(inFake, ours)})
					if got != want {
						t.Fatalf("step %d: the kernel's %s %s is\n%s\nthe fake's\n%s", step, f.name(), table, got, want)
					}
				}
			}
		}
	})
}
