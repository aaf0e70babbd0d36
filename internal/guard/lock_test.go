package guard

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// claimsOf returns what the kernel's set of IPv4 services holds.
func claimsOf(t *testing.T, g *Guard) []ravel.ServiceKey {
	t.Helper()
	list, _, err := g.sets.list(g.families[0].svc)
	must(t, err)
	return sorted(list)
}

// While another program holds the lock of iptables, entries change at once, rules that were in place are looked at
// later, and only rules that are known to be missing are waited for.
func TestHeldLock(t *testing.T) {
	nettest.Need(t, nettest.IPSet, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		tables := open(t, iptables.Legacy)
		g := New(Options{Tables: tables, Enabled: true})
		mustApply(t, g, vips, nil)
		next := uint16(0)
		// within guards all VIPs while the lock is held, with one claim more than before.
		within := func(what string, limit time.Duration) {
			t.Helper()
			g.Resync()
			next++
			claim := []ravel.ServiceKey{key(ravel.TCP, vips[0], next)}
			start := time.Now()
			mustApply(t, g, vips, claim)
			if took := time.Since(start); took > limit {
				t.Fatalf("%s: took %s", what, took)
			}
			if got := claimsOf(t, g); !slices.Equal(got, claim) {
				t.Fatalf("%s: claimed %v, want %v", what, got, claim)
			}
		}
		release := nettest.HoldTables(t)
		within("rules in place", 2*time.Second)
		if g.families[0].guard.putOff != 0 {
			t.Fatal("rules in place are seen without the lock, and it was put off")
		}
		release()

		for _, command := range []string{"iptables-legacy", "ip6tables-legacy"} {
			nettest.Run(t, command, "-I", "INPUT", "-p", "tcp", "--dport", "22", "-j", "ACCEPT")
		}
		release = nettest.HoldTables(t)
		for n := range late {
			if p := g.Problems(); len(p) != 0 {
				t.Fatalf("put off %d times, and already a problem: %v", n, p)
			}
			within("rules behind another's", 4*time.Second)
		}
		if p := g.Problems(); len(p) != 2 {
			t.Fatalf("put off %d times, and the problems are %v", late, p)
		}
		release()
		mustApply(t, g, vips, nil)
		if p := g.Problems(); len(p) != 0 {
			t.Fatalf("problems that are over: %v", p)
		}
		for i := range tables {
			rules, err := tables[i].Rules(t.Context(), table, hook)
			must(t, err)
			if len(rules) != 2 || !strings.HasSuffix(rules[0], "-j "+chain) {
				t.Fatalf("our jump is not first: %q", rules)
			}
		}
		if drift := testutil.ToFloat64(g.metrics.drift.WithLabelValues("rule")); drift != 2 {
			t.Fatalf("rules changed once a family, counted %v", drift)
		}

		// Rules that are gone guard nothing: that is an error, of this family only, and then waiting is right.
		nettest.Run(t, "iptables-legacy", "-F", chain)
		release = nettest.HoldTables(t)
		g.Resync()
		guarded, err := g.Apply(t.Context(), vips, nil, nil)
		if err == nil || !slices.Equal(guarded, vips[1:]) || len(g.Problems()) != 1 {
			t.Fatalf("IPv4's chain is empty: guarded %v, %v, problems %v", guarded, err, g.Problems())
		}
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		guarded, err = g.Apply(ctx, vips, []ravel.ServiceKey{key(ravel.TCP, vips[0], 80)}, nil)
		cancel()
		if err == nil || !slices.Equal(guarded, vips[1:]) {
			t.Fatalf("waited for nothing: guarded %v, %v", guarded, err)
		}
		time.AfterFunc(3*time.Second, release)
		mustApply(t, g, vips, nil)
	})
}

// A process that starts while the lock is held takes over rules that are in place; where there are none it says so.
func TestHeldLockAtStart(t *testing.T) {
	nettest.Need(t, nettest.IPSet, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		tables := open(t, iptables.Legacy)
		release := nettest.HoldTables(t)
		g := New(Options{Tables: tables, Enabled: true})
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		guarded, err := g.Apply(ctx, vips, []ravel.ServiceKey{key(ravel.TCP, vips[0], 80)}, nil)
		cancel()
		if err == nil || len(guarded) != 0 {
			t.Fatalf("no rules: guarded %v, %v", guarded, err)
		}
		if got := claimsOf(t, g); len(got) != 1 {
			t.Fatalf("the sets need no lock, and hold %v", got)
		}
		release()
		mustApply(t, g, vips, nil)
		defer nettest.HoldTables(t)()
		again := New(Options{Tables: tables, Enabled: true})
		ctx, cancel = context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		guarded, err = again.Apply(ctx, vips, nil, nil)
		must(t, err)
		if !slices.Equal(guarded, vips) {
			t.Fatalf("guarded %v", guarded)
		}
	})
}
