package realserver

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestStands(t *testing.T) {
	first := hook{table: "filter", chain: "INPUT", to: "RAVEL-OUTER"}
	early := hook{table: "nat", chain: "PREROUTING", to: "RAVEL", before: "KUBE-SERVICES"}
	for _, test := range []struct {
		hook  hook
		rules []string
		want  bool
	}{
		{first, nil, false},
		{first, []string{"-j RAVEL-OUTER"}, true},
		{first, []string{"-m set --match-set ravel4-vip dst -j RAVEL-GUARD", "-j RAVEL-OUTER", "-j DROP"}, true},
		{first, []string{"-j DROP", "-j RAVEL-OUTER"}, false},
		{first, []string{`-m comment --comment "-j RAVEL" -j DROP`, "-j RAVEL-OUTER"}, false},
		{first, []string{"-j RAVEL-OUTER", "-j DROP", "-j RAVEL-OUTER"}, false},
		{first, []string{"-p tcp -j RAVEL-OUTER", "-j RAVEL-OUTER"}, false},

		{early, nil, false},
		{early, []string{"-j KUBE-SERVICES"}, false},
		{early, []string{"-j RAVEL"}, true},
		{early, []string{"-j RAVEL", `-m comment --comment "kubernetes service portals" -j KUBE-SERVICES`}, true},
		{early, []string{`-m comment --comment "kubernetes service portals" -j KUBE-SERVICES`, "-j RAVEL"}, false},
		{early, []string{"-g KUBE-SERVICES", "-j RAVEL"}, false},
		{early, []string{`-m comment --comment "-j KUBE-SERVICES" -j cali-PREROUTING`, "-j RAVEL", "-j KUBE-SERVICES"}, true},
		{early, []string{"-j cali-PREROUTING", "-j RAVEL", "-m addrtype --dst-type LOCAL -j DOCKER"}, true},
		{early, []string{"-m addrtype --dst-type LOCAL -j DOCKER", "-j RAVEL"}, false},
		{early, []string{"-j RAVEL", "-j KUBE-SERVICES", "-j RAVEL"}, false},
		{early, []string{"-p tcp -j RAVEL"}, false},
	} {
		rules := make([]string, len(test.rules))
		for i, r := range test.rules {
			rules[i] = "-A " + test.hook.chain + " " + r
		}
		if got := test.hook.stands(rules); got != test.want {
			t.Errorf("%s among %q: stands is %t", test.hook.to, test.rules, got)
		}
	}
}

// What a Look costs and finds, on tables that count: nothing is read while nothing changes, faults are for the Resync.
func TestLook(t *testing.T) {
	r, fakes, _ := fakeReal(t)
	look := func(when string, want bool) {
		t.Helper()
		if got := r.Look(t.Context()); got != want {
			t.Fatalf("%s: look is %t", when, got)
		}
	}
	look("nothing is wanted", false)
	apply(t, r, everyKind(0)...)
	look("all is as it was made", false)
	nat := fakes[0].tables["nat"]
	nat["PREROUTING"] = append([]string{"-j KUBE-SERVICES"}, nat["PREROUTING"]...)
	fakes[0].failNext = 1
	look("the kernel does not answer", false)
	fakes[0].failNext = 2
	look("the rules cannot be read", false)
	look("overtaken", true)
	look("the next apply mends it", false)
	before := len(fakes[0].restores)
	apply(t, r, everyKind(0)...)
	if got := fakes[0].tables["nat"]["PREROUTING"]; got[0] != "-j RAVEL" || len(got) != 2 || len(fakes[0].restores) != before {
		t.Fatalf("mended to %q by %q", got, fakes[0].restores[before:])
	}
	look("mended", false)
	look("mended", false)
	// A flush takes more than the jump.
	for chain := range fakes[1].tables["nat"] {
		if strings.HasPrefix(chain, "RAVEL") {
			fakes[1].tables["nat"][chain] = nil
		}
	}
	fakes[1].tables["nat"]["PREROUTING"] = nil
	look("flushed", true)
	apply(t, r, everyKind(0)...)
	if got := fakes[1].tables["nat"]; len(got["PREROUTING"]) != 1 || len(got["RAVEL"]) == 0 {
		t.Fatalf("mended to %q", got)
	}
	for i, name := range []string{"ipv4", "ipv6"} {
		if n := testutil.ToFloat64(r.metrics.overtaken.WithLabelValues(name)); n != 1 {
			t.Errorf("family %d was overtaken once, counted %v", i, n)
		}
	}
}

// kubeJump is what kube-proxy inserts, in its words.
const kubeJump = `PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES`

// kubeTakes makes rules as kube-proxy's for a VIP that it knows by externalIPs, which lead to a pod of its choice.
func kubeTakes(t testing.TB, v iptables.Variant, port uint16, pod int) {
	t.Helper()
	for command, x := range map[string]ravel.Redirect{
		"iptables": redirect(ravel.TCP, vip4, port, pod), "ip6tables": redirect(ravel.TCP, vip6, port, pod),
	} {
		nettest.Shell(t, fmt.Sprintf(`%[1]s -t nat -N KUBE-SERVICES; %[1]s -t nat -N KUBE-EXT-X
			%[1]s -t nat -A KUBE-SERVICES -d %[2]s -p tcp -m tcp --dport %[3]d -j KUBE-EXT-X
			%[1]s -t nat -A KUBE-EXT-X -p tcp -m tcp -j DNAT --to-destination %[4]s`,
			command+"-"+string(v), x.Key.VIP, port, x.Pods[0]))
	}
}

// Another program puts its jump at the head again and again, at any moment, also while we mend. Whatever it does, a look
// and an apply after its last word lead packets to our pods, and its own rules stay as they are.
func TestKubeProxyWantsToBeFirst(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		l := newLab(t, 2)
		l.serve(8080)
		kubeTakes(t, v, 80, 1)
		programs := []string{"iptables-" + string(v), "ip6tables-" + string(v)}
		for _, program := range programs {
			nettest.Shell(t, program+" -t nat -I "+kubeJump)
		}
		keys := []ravel.Redirect{redirect(ravel.TCP, vip4, 80, 0), redirect(ravel.TCP, vip6, 80, 0)}
		reached := func(when, want string) {
			t.Helper()
			for _, x := range keys {
				if pod, _, _, err := ask(x.Key); pod != want || err != nil {
					t.Fatalf("%s: %s leads to %q, %v, want %s", when, x.Key, pod, err, want)
				}
			}
		}
		reached("without us", podNS(1))
		r := newReal(t, v, nil)
		apply(t, r, keys...)
		reached("with us", podNS(0))

		rounds := 25
		if !nettest.Has(nettest.PlainClock) {
			rounds = 8
		}
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		ctx, cancel := context.WithCancel(t.Context())
		var writer, mender sync.WaitGroup
		defer mender.Wait()
		defer cancel()
		mender.Go(func() { // the loop of the node, in haste
			for ctx.Err() == nil {
				if r.Look(ctx) {
					if _, err := r.Apply(ctx, keys, directors); err != nil && ctx.Err() == nil {
						t.Errorf("mending: %v", err)
					}
				}
				select {
				case <-ctx.Done():
				case <-time.After(time.Millisecond):
				}
			}
		})
		writer.Go(func() {
			for range rounds {
				for _, program := range programs {
					script := program + " -w 5 -t nat -I " + kubeJump
					if rng.IntN(3) == 0 { // as kube-proxy does it, which looks first
						script = program + " -w 5 -t nat -D " + kubeJump + "; " + script
					}
					if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
						t.Errorf("%s: %v: %s", script, err, out)
					}
				}
				select {
				case <-ctx.Done():
				case <-time.After(time.Duration(rng.IntN(20)) * time.Millisecond):
				}
			}
		})
		writer.Wait()
		// A move that leaves as many rules as before is seen by a look with nft, and with legacy by the next resync.
		if v == iptables.Legacy {
			r.Resync()
			if _, err := r.Apply(t.Context(), keys, directors); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, func() error {
			for _, program := range programs {
				rules := nettest.Run(t, program, "-t", "nat", "-S", "PREROUTING")
				if ours, theirs := strings.Index(rules, "-j RAVEL\n"), strings.Index(rules, "-j KUBE-SERVICES"); ours < 0 || theirs < ours {
					return errors.New("our jump does not stand before kube-proxy's:\n" + rules)
				}
			}
			return nil
		})
		reached("after the last insertion", podNS(0))
		if n := testutil.ToFloat64(r.metrics.overtaken.WithLabelValues("ipv4")); n < 1 {
			t.Errorf("the writer came before us %v times: the test shows nothing", n)
		}
		cancel()
		mender.Wait()
		for _, program := range programs {
			nettest.Shell(t, "while "+program+" -t nat -D "+kubeJump+" 2>/dev/null; do :; done; "+program+" -t nat -A "+kubeJump)
			if rules := nettest.Run(t, program, "-t", "nat", "-S", "KUBE-SERVICES"); strings.Count(rules, "-A ") != 1 {
				t.Errorf("kube-proxy's own chain is now\n%s", rules)
			}
		}
		if _, err := r.Cleanup(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		reached("after cleanup", podNS(1))
	})
}
