package realserver

import (
	"context"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/vishvananda/netlink"
)

// everyKind returns a redirect of each family and protocol to the same pods.
func everyKind(pods ...int) []ravel.Redirect {
	var all []ravel.Redirect
	for _, vip := range []netip.Addr{vip4, vip6} {
		all = append(all, redirect(ravel.TCP, vip, 80, pods...), redirect(ravel.UDP, vip, 53, pods...))
	}
	return all
}

// Pods see the client, or with masquerading the node; the client always sees the VIP, because its sockets take no
// answer from elsewhere.
func TestAddresses(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		l := newLab(t, 2)
		l.serve(8080)
		node := map[bool][]string{true: {"10.2.1.1", "10.2.2.1"}, false: {"fd02:1::1", "fd02:2::1"}}
		for _, tt := range []struct {
			name               string
			masquerade, exempt bool
		}{
			{name: "plain"},
			{name: "masquerade", masquerade: true},
			{name: "plain again"},
			{name: "masquerade, the client's network exempt", masquerade: true, exempt: true},
		} {
			r := newReal(t, v, func(o *Options) {
				if tt.exempt {
					o.NoMasquerade = []netip.Prefix{netip.MustParsePrefix("10.1.0.7/24"), netip.MustParsePrefix("fd01::/64")}
				}
			})
			all := everyKind(0, 1)
			for i := range all {
				all[i].Masquerade = tt.masquerade
			}
			apply(t, r, all...)
			flushFlows(t)
			for _, x := range all {
				pod, saw, own, err := ask(x.Key)
				if err != nil {
					t.Fatalf("%s: %s: %v", tt.name, x.Key, err)
				}
				if tt.masquerade && !tt.exempt {
					if !slices.Contains(node[x.Key.VIP.Is4()], saw.Addr().String()) {
						t.Errorf("%s: %s: %s saw %s, want the node", tt.name, x.Key, pod, saw)
					}
				} else if saw != own {
					t.Errorf("%s: %s: %s saw %s, want the client's %s", tt.name, x.Key, pod, saw, own)
				}
			}
		}
	})
}

// Each pod takes its share of new flows, within 4 sigma.
func TestSpread(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		const pods, flows = 5, 1200
		l := newLab(t, pods)
		l.serve(8080)
		r := newReal(t, v, nil)
		for _, x := range []ravel.Redirect{redirect(ravel.TCP, vip4, 80, 0, 1, 2, 3, 4), redirect(ravel.UDP, vip6, 53, 0, 1, 2, 3, 4)} {
			apply(t, r, x)
			count := map[string]int{}
			for range flows {
				pod, _, _, err := ask(x.Key)
				if err != nil {
					t.Fatalf("%s: %v", x.Key, err)
				}
				count[pod]++
			}
			mean, sigma := flows/float64(pods), math.Sqrt(flows/float64(pods)*(1-1/float64(pods)))
			for i := range pods {
				if n := count[podNS(i)]; math.Abs(float64(n)-mean) > 4*sigma {
					t.Errorf("%s: %s took %d of %d flows, want %.0f within %.0f", x.Key, podNS(i), n, flows, mean, 4*sigma)
				}
			}
			status, err := r.Status(t.Context())
			if err != nil || len(status) != 1 || !status[0].Held || status[0].Flows > flows || len(status[0].Pods) != pods {
				t.Fatalf("status is %+v, %v; want one redirect of at most %d flows", status, err, flows)
			}
			for i, p := range status[0].Pods {
				// A UDP client's port may come again while conntrack still knows the flow.
				n := uint64(count[podNS(i)])
				if p.Flows > n || p.Flows < n*9/10 || x.Key.Proto == ravel.TCP && p.Flows != n || p.Bytes == 0 || p.Probability != 1/float64(pods) {
					t.Errorf("status of %s is %+v, want %d flows", podNS(i), p, count[podNS(i)])
				}
			}
		}
	})
}

// A TCP flow keeps its pod whatever becomes of the redirect; so does a UDP flow, until its pod goes.
func TestFlowsKeepTheirPod(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		l := newLab(t, 3)
		l.serve(8080)
		nettest.Shell(t, "for f in iptables ip6tables; do $f-"+string(v)+" -P FORWARD DROP; done")
		r := newReal(t, v, nil)
		all := everyKind(0)
		apply(t, r, all...)
		conns := map[ravel.ServiceKey]net.Conn{}
		for _, x := range all {
			c, err := dial(x.Key)
			if err != nil {
				t.Fatalf("%s: %v", x.Key, err)
			}
			defer c.Close()
			if pod, _, err := askOn(c); err != nil || pod != podNS(0) {
				t.Fatalf("%s: %s answers, %v", x.Key, pod, err)
			}
			conns[x.Key] = c
		}
		check := func(when string, udp string) {
			t.Helper()
			for key, c := range conns {
				if key.Proto == ravel.TCP {
					if err := echo(c, "still there?"); err != nil {
						t.Errorf("%s, %s: %v", when, key, err)
					}
				} else if pod, _, err := askOn(c); err != nil || pod != udp {
					t.Errorf("%s, %s: %q answers, want %s: %v", when, key, pod, udp, err)
				}
			}
		}
		apply(t, r, everyKind(0, 1, 2)...)
		check("pods added", podNS(0))
		apply(t, r, everyKind(1)...)
		check("its pod gone", podNS(1))
		apply(t, newReal(t, v, nil), everyKind(2)...)
		check("its pod gone, seen by a new process", podNS(2))
		apply(t, r)
		for key, c := range conns {
			if key.Proto == ravel.TCP {
				if err := echo(c, "redirect gone"); err != nil {
					t.Errorf("redirect gone, %s: %v", key, err)
				}
			} else {
				stopped(t, v, key.VIP, "udp", func() {
					if pod, _, err := askOnFor(c, aMoment); err == nil {
						t.Errorf("redirect gone, %s: %s answers", key, pod)
					}
				})
			}
		}
	})
}

// A client that sent before there was a rule has an entry in conntrack that would keep it from the rule for ever.
func TestEarlyDatagrams(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		l := newLab(t, 1)
		l.serve(8080)
		// The VIP is here, as it is on a realserver that another redirect of it holds.
		nettest.Shell(t, "ip addr add 192.0.2.1/32 dev lo; ip addr add 2001:db8::1/128 dev lo")
		t.Cleanup(func() { nettest.Shell(t, "ip addr del 192.0.2.1/32 dev lo; ip addr del 2001:db8::1/128 dev lo") })
		// Conntrack follows flows as soon as somebody has a rule for it.
		nettest.Shell(t, "for f in iptables ip6tables; do $f-"+string(v)+" -A INPUT -m conntrack --ctstate NEW -p udp -j DROP; done")
		r := newReal(t, v, nil)
		other := []ravel.Redirect{redirect(ravel.TCP, vip4, 80, 0), redirect(ravel.TCP, vip6, 80, 0)}
		apply(t, r, other...)
		var conns []net.Conn
		for _, vip := range []netip.Addr{vip4, vip6} {
			key := ravel.ServiceKey{VIP: vip, Proto: ravel.UDP, Port: 53}
			c, err := dial(key)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			conns = append(conns, c)
			nettest.Shell(t, "for f in iptables ip6tables; do $f-"+string(v)+" -F INPUT; done")
			if _, err := c.Write([]byte("early")); err != nil {
				t.Fatal(err)
			}
			eventually(t, func() error {
				for _, family := range []netlink.InetFamily{netlink.FAMILY_V4, netlink.FAMILY_V6} {
					flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
					if err != nil {
						return err
					}
					for _, f := range flows {
						if f.Forward.DstPort == 53 && f.Forward.DstIP.Equal(vip.AsSlice()) {
							return nil
						}
					}
				}
				return fmt.Errorf("%s: no entry", key)
			})
		}
		apply(t, r, append(other, redirect(ravel.UDP, vip4, 53, 0), redirect(ravel.UDP, vip6, 53, 0))...)
		for _, c := range conns {
			eventually(t, func() error { // the refusal of the early datagram may still lie in the socket
				pod, _, err := askOnFor(c, aMoment)
				if err == nil && pod != podNS(0) {
					err = fmt.Errorf("%s answers", pod)
				}
				return err
			})
		}
	})
}

// Cleanup leaves nothing of ours, and a new process with the same wish writes nothing.
func TestRestartAndCleanup(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		empty := saved(t, v)
		all := everyKind(0, 1, 2)
		all[0].Masquerade, all[1].Name, all[2].Name, all[3].Name = true, `a "quoted" \ 'name'`, "", "plain"
		apply(t, newReal(t, v, nil), all...)
		before := saved(t, v)

		r := newReal(t, v, nil)
		for _, f := range r.families {
			f.tables = noWriting{t, f.tables}
		}
		apply(t, r, all...)
		r.Resync()
		apply(t, r, all...)
		if after := saved(t, v); after != before {
			t.Errorf("a restart changed the rules from\n%s\nto\n%s", before, after)
		}
		would, err := r.Cleanup(t.Context(), true)
		if err != nil || saved(t, v) != before {
			t.Errorf("a dry run changed rules: %v", err)
		}
		for _, f := range r.families {
			f.tables = f.tables.(noWriting).tables
		}
		did, err := r.Cleanup(t.Context(), false)
		if err != nil || !slices.Equal(did, would) || len(did) == 0 {
			t.Errorf("cleanup did %q, the dry run said %q: %v", did, would, err)
		}
		if after := saved(t, v); after != empty {
			t.Errorf("cleanup left\n%s\nwant\n%s", after, empty)
		}
		if again, err := r.Cleanup(t.Context(), false); err != nil || len(again) > 0 {
			t.Errorf("a second cleanup did %q, %v", again, err)
		}
	})
}

// noWriting fails the test when a rule is written.
type noWriting struct {
	t *testing.T
	tables
}

func (n noWriting) Restore(ctx context.Context, input string) error {
	n.t.Errorf("unneeded change:\n%s", input)
	return n.tables.Restore(ctx, input)
}

// What others do to our rules is mended at the next resync.
func TestResync(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		ipt := "iptables-" + string(v)
		r := newReal(t, v, nil)
		all := everyKind(0, 1)
		apply(t, r, all...)
		want := saved(t, v)
		chain, vip := r.names.service(all[0].Key), r.names.vip(vip4)
		for _, damage := range []string{
			ipt + " -t nat -D PREROUTING -j RAVEL",
			ipt + " -t nat -A PREROUTING -j RAVEL", // a second time
			ipt + " -t nat -F " + chain,
			ipt + " -t nat -D " + chain + " 1",
			ipt + " -t nat -I " + chain + " -j RETURN",
			ipt + " -t nat -F RAVEL; " + ipt + " -t nat -F " + vip + "; " + ipt + " -t nat -X " + vip,
			ipt + " -t nat -N RAVEL-SVC-ABCDEFGHIJKL", // an old one of ours
			ipt + " -D FORWARD -j RAVEL-FORWARD; " + ipt + " -F RAVEL-FORWARD; " + ipt + " -X RAVEL-FORWARD",
		} {
			nettest.Shell(t, damage)
			if saved(t, v) == want {
				t.Fatalf("%s changed nothing", damage)
			}
			r.Resync()
			apply(t, r, all...)
			if got := saved(t, v); got != want {
				t.Errorf("after %q:\n%s\nwant\n%s", damage, got, want)
			}
		}
		// Ours stays before kube-proxy's and first in FORWARD.
		nettest.Shell(t, ipt+" -t nat -N KUBE-SERVICES; "+ipt+" -t nat -I PREROUTING -j KUBE-SERVICES; "+ipt+" -I FORWARD -j DROP")
		r.Resync()
		apply(t, r, all...)
		for command, want := range map[string]string{
			ipt + " -t nat -S PREROUTING": "-P PREROUTING ACCEPT\n-A PREROUTING -j RAVEL\n-A PREROUTING -j KUBE-SERVICES\n",
			ipt + " -S FORWARD":           "-P FORWARD ACCEPT\n-A FORWARD -j RAVEL-FORWARD\n-A FORWARD -j DROP\n",
		} {
			if got := nettest.Shell(t, command+" 2>/dev/null"); got != want {
				t.Errorf("%s: %q, want %q", command, got, want)
			}
		}
		// A rule of another's into a chain of ours that should go keeps the chain, empty, and nothing else.
		nettest.Shell(t, ipt+" -t nat -N OTHER; "+ipt+" -t nat -A OTHER -j "+chain)
		apply(t, r, all[1:]...)
		if got := nettest.Shell(t, ipt+" -t nat -S "+chain+" 2>/dev/null"); got != "-N "+chain+"\n" {
			t.Errorf("the chain that OTHER jumps to: %q", got)
		}
		nettest.Shell(t, ipt+" -t nat -F OTHER")
		apply(t, r, all[1:]...)
		if err := exec.Command(ipt, "-t", "nat", "-S", chain).Run(); err == nil {
			t.Errorf("%s is still there", chain)
		}
	})
}
