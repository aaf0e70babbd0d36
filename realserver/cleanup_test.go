package realserver

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// inFamilies runs commands of both families.
func inFamilies(t *testing.T, v iptables.Variant, args ...string) {
	t.Helper()
	for _, a := range args {
		nettest.Shell(t, "for f in iptables ip6tables; do $f-"+string(v)+" "+a+"; done")
	}
}

// A foreign rule that leads to a chain of ours keeps that chain alone, empty, and is named.
func TestCleanupWithForeignJump(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		inFamilies(t, v, "-t nat -N MINE")
		foreign := saved(t, v)
		r := newReal(t, v, nil)
		all := everyKind(0, 1)
		for i := range all {
			all[i].Masquerade = true
		}
		apply(t, r, all...)
		inFamilies(t, v, "-t nat -A MINE -p tcp -j RAVEL", "-t nat -A MINE -g RAVEL-MASQ")
		would, err := r.Cleanup(t.Context(), true)
		if err != nil {
			t.Fatal(err)
		}
		did, err := r.Cleanup(t.Context(), false)
		for _, part := range []string{"nat RAVEL stays", "-A MINE -p tcp -j RAVEL", "nat RAVEL-MASQ stays", "-A MINE -g RAVEL-MASQ", "ipv4", "ipv6"} {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("error %v does not name %q", err, part)
			}
		}
		if !slices.Equal(did, would) || !slices.ContainsFunc(did, func(l string) bool {
			return strings.HasPrefix(l, "iptables -t nat -F RAVEL ") && strings.Contains(l, "-A MINE -p tcp -j RAVEL")
		}) {
			t.Errorf("cleanup did\n%s\nthe dry run said\n%s", strings.Join(did, "\n"), strings.Join(would, "\n"))
		}
		want := strings.ReplaceAll(foreign, ":MINE - \n", ":MINE - \n:RAVEL - \n:RAVEL-MASQ - \n")
		want = strings.ReplaceAll(want, ":MINE -\n", ":MINE -\n:RAVEL -\n:RAVEL-MASQ -\n")
		var left strings.Builder
		for line := range strings.Lines(saved(t, v)) {
			if !strings.HasPrefix(line, "-A MINE ") {
				left.WriteString(line)
			}
		}
		if left.String() != want {
			t.Errorf("left\n%s\nwant\n%s", left.String(), want)
		}
		inFamilies(t, v, "-t nat -F MINE")
		if _, err := r.Cleanup(t.Context(), false); err != nil {
			t.Error(err)
		}
		if got := saved(t, v); got != foreign {
			t.Errorf("the second cleanup left\n%s\nwant\n%s", got, foreign)
		}
	})
}

// Cleanup needs to know nothing of the run that it cleans up after; the guard's chain and others' stay.
func TestCleanupOfAnotherChain(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		inFamilies(t, v, "-N RAVEL-GUARD", "-A INPUT -j RAVEL-GUARD", "-t nat -N RAVELLER", "-t nat -A RAVELLER -j RETURN",
			"-t nat -A PREROUTING -j RAVELLER", "-t nat -N RAVELLER-MINE", "-t nat -N RAVELOFOTHERS-POST", "-N RAVELX-MINE")
		foreign := saved(t, v)
		for _, chain := range []string{"RAVELX", "RAVEL", "RAVEL12345"} {
			all := everyKind(0, 1)
			for i := range all {
				all[i].Masquerade = true
			}
			apply(t, newReal(t, v, func(o *Options) { o.Chain = chain }), all...)
		}
		r := newReal(t, v, nil)
		before := saved(t, v)
		would, err := r.Cleanup(t.Context(), true)
		if err != nil || saved(t, v) != before {
			t.Errorf("a dry run changed rules: %v", err)
		}
		did, err := r.Cleanup(t.Context(), false)
		if err != nil || !slices.Equal(did, would) {
			t.Errorf("cleanup did %q, the dry run said %q: %v", did, would, err)
		}
		if got := saved(t, v); got != foreign {
			t.Errorf("cleanup left\n%s\nwant\n%s", got, foreign)
		}
		inFamilies(t, v, "-F INPUT", "-t nat -F PREROUTING")
	})
}

// Every call that fails leaves an error, and the next cleanup makes up for it.
func TestCleanupFailures(t *testing.T) {
	for n := 1; n < 40; n++ {
		r, tables, _ := fakeReal(t)
		x := redirect(ravel.TCP, vip4, 80, 0)
		x.Tunnelled, x.Masquerade = true, true
		apply(t, r, x)
		tables[0].failNext = n
		if _, err := r.Cleanup(t.Context(), false); err == nil && tables[0].failNext == 0 {
			t.Errorf("call %d failed unseen", n)
		}
		tables[0].failNext = 0
		if _, err := r.Cleanup(t.Context(), false); err != nil {
			t.Errorf("after call %d failed: %v", n, err)
		}
		for table, chains := range tables[0].tables {
			for chain, rules := range chains {
				if strings.HasPrefix(chain, "RAVEL") || len(rules) > 0 {
					t.Errorf("after call %d failed: %s %s holds %q", n, table, chain, rules)
				}
			}
		}
	}
}

// A start with another chain takes over from what the last one left: its redirects and jumps go, what lets packets pass
// stays for flows that are open, and others' rules do not change.
func TestAnotherChainTakesOver(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		inFamilies(t, v, "-t nat -N RAVELLER", "-t nat -A RAVELLER -j RETURN", "-t nat -A PREROUTING -j RAVELLER")
		all := everyKind(0, 1)
		for i := range all {
			all[i].Masquerade = true
		}
		apply(t, newReal(t, v, nil), all...)
		r := newReal(t, v, func(o *Options) { o.Chain = "RAVELX" })
		apply(t, r, all[:1]...)
		old := regexp.MustCompile(`(?m)^.*\bRAVEL(-\S+)?( .*)?$`)
		for _, line := range old.FindAllString(saved(t, v), -1) {
			if !strings.Contains(line, "RAVEL-FORWARD") && !strings.Contains(line, "RAVEL-INPUT") {
				t.Errorf("left: %s", line)
			}
		}
		if !strings.Contains(saved(t, v), "-A PREROUTING -j RAVELLER") {
			t.Error("another program's jump is gone")
		}
		once := saved(t, v)
		if apply(t, r, all[:1]...); saved(t, v) != once {
			t.Error("the second Apply changed something")
		}
		inFamilies(t, v, "-t nat -F PREROUTING")
	})
}
