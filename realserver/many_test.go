package realserver

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// foreignService is what kube-proxy writes for a Service: a chain that picks one of three pods.
func foreignService(command string, n, generation int) (chain string, rules []string) {
	chain = fmt.Sprintf("KUBE-SVC-%016d", n)
	for pod := range 3 {
		to := fmt.Sprintf("10.%d.%d.%d:%d", n/250, n%250, pod+1, 1000+generation)
		if command == "ip6tables" {
			to = fmt.Sprintf("[fd03:%x::%d]:%d", n+1, pod+1, 1000+generation)
		}
		rules = append(rules, fmt.Sprintf("-A %s -p tcp -m comment --comment \"ns/service-%d:http\" -j DNAT --to-destination %s", chain, n, to))
	}
	return chain, rules
}

func restore(program, input string) error {
	var err error
	for range 10 { // as kube-proxy, which tries again
		cmd := exec.Command(program+"-restore", "-w", "5", "--noflush", "--counters")
		cmd.Stdin = strings.NewReader(input)
		var out []byte
		if out, err = cmd.CombinedOutput(); err == nil {
			return nil
		}
		err = fmt.Errorf("%w: %s", err, out)
	}
	return err
}

// Another program has thousands of rules in the tables that we write, and both change theirs at the same time: neither
// loses one. RAVEL_FOREIGN_RULES=20000 and RAVEL_FOREIGN_CHANGES=200 are the long form, which prints what a change costs.
func TestBesideManyRules(t *testing.T) {
	number := func(name string, fallback int) int {
		if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
			return n
		}
		return fallback
	}
	rules, changes := number("RAVEL_FOREIGN_RULES", 1000), number("RAVEL_FOREIGN_CHANGES", 12)
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		services := rules / 4 // with the rule that leads to the chain
		commands := []string{"iptables", "ip6tables"}
		generations := map[string][]int{}
		for _, command := range commands {
			generations[command] = make([]int, services)
			var chains, all strings.Builder
			for n := range services {
				chain, rules := foreignService(command, n, 0)
				fmt.Fprintf(&chains, ":%s - [0:0]\n", chain)
				fmt.Fprintf(&all, "-A KUBE-SERVICES -p tcp -m tcp --dport %d -j %s\n%s\n", 1+n, chain, strings.Join(rules, "\n"))
			}
			input := "*nat\n:KUBE-SERVICES - [0:0]\n" + chains.String() + "-A PREROUTING -j KUBE-SERVICES\n" + all.String() + "COMMIT\n"
			if err := restore(command+"-"+string(v), input); err != nil {
				t.Fatal(err)
			}
		}
		r := newReal(t, v, nil)
		ours := make([]ravel.Redirect, 0, 40)
		for port := range uint16(20) {
			ours = append(ours, redirect(ravel.TCP, vip4, 1+port, 0, 1), redirect(ravel.TCP, vip6, 1+port, 0, 1))
		}
		slices.SortFunc(ours, func(a, b ravel.Redirect) int { return a.Key.Compare(b.Key) })
		apply(t, r, ours...)

		measure := func(what string, fn func()) {
			began := time.Now()
			fn()
			t.Logf("beside %d foreign rules a family, %s: %s", rules, what, time.Since(began).Round(10*time.Microsecond))
		}
		measure("a look after a change, both families", func() { r.Look(t.Context()) })
		measure("a look while nothing changes", func() { r.Look(t.Context()) })
		measure("a resync", func() { r.Resync(); apply(t, r, ours...) })

		var took, theirs []time.Duration
		var both sync.WaitGroup
		both.Go(func() {
			for n := range changes {
				for _, command := range commands {
					at := n % services
					generations[command][at]++
					chain, rules := foreignService(command, at, generations[command][at])
					began := time.Now()
					if err := restore(command+"-"+string(v), "*nat\n:"+chain+" - [0:0]\n"+strings.Join(rules, "\n")+"\nCOMMIT\n"); err != nil {
						t.Error(err)
						return
					}
					theirs = append(theirs, time.Since(began))
				}
			}
		})
		both.Go(func() {
			for n := range changes {
				for family := range 2 {
					i := n%20 + 20*family
					ours[i] = redirect(ravel.TCP, ours[i].Key.VIP, ours[i].Key.Port, n%3, 3+n%2)
				}
				if n%10 == 9 {
					r.Resync()
				}
				began := time.Now()
				_ = r.Look(t.Context())
				if _, err := r.Apply(t.Context(), ours, directors); err != nil {
					t.Error(err)
					return
				}
				took = append(took, time.Since(began))
			}
		})
		both.Wait()
		if t.Failed() {
			return
		}
		for _, command := range commands {
			var want, got []string
			for n, generation := range generations[command] {
				chain, rules := foreignService(command, n, generation)
				want = append(append(want, rules...), fmt.Sprintf("-A KUBE-SERVICES -p tcp -m tcp --dport %d -j %s", 1+n, chain))
			}
			for line := range strings.Lines(nettest.Run(t, command+"-"+string(v)+"-save", "-t", "nat")) {
				if strings.HasPrefix(line, "-A KUBE-") {
					got = append(got, strings.TrimSpace(line))
				}
			}
			slices.Sort(want)
			slices.Sort(got)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s: the others' %d rules (-want +got):\n%s", command, len(want), diff)
			}
		}
		made := testutil.ToFloat64(r.metrics.transactions.WithLabelValues("ipv4"))
		r.Resync()
		apply(t, r, ours...)
		if now := testutil.ToFloat64(r.metrics.transactions.WithLabelValues("ipv4")); now != made || made < float64(changes) {
			t.Errorf("of ours something was lost, and had to be made again: %v transactions, then %v", made, now)
		}
		for who, list := range map[string][]time.Duration{"ours, both families": took, "theirs": theirs} {
			slices.Sort(list)
			t.Logf("%d foreign rules a family, %d changes %s: median %s, 99th percentile %s", rules, len(list), who,
				list[len(list)/2].Round(100*time.Microsecond), list[len(list)*99/100].Round(100*time.Microsecond))
		}
	})
}
