package iptables

import (
	"testing"

	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// eachTables runs a test for both families of both variants, each in a network namespace of its own.
func eachTables(t *testing.T, fn func(t *testing.T, tables *Tables)) {
	features := map[Variant]nettest.Feature{NFT: nettest.NftNAT, Legacy: nettest.LegacyNAT}
	for _, v := range []Variant{NFT, Legacy} {
		for _, f := range []Family{V4, V6} {
			t.Run(string(v)+"/"+f.String(), func(t *testing.T) {
				nettest.Need(t, features[v])
				nettest.InNetns(t, func() {
					tables, err := Open(v, f)
					if err != nil {
						t.Fatal(err)
					}
					fn(t, tables)
				})
			})
		}
	}
}

func TestEnsureFirst(t *testing.T) {
	jump := []string{"-m", "comment", "--comment", "ravel: first", "-j", "RAVEL-X"}
	eachTables(t, func(t *testing.T, tables *Tables) {
		ctx := t.Context()
		if err := tables.EnsureChain(ctx, "nat", "RAVEL-X"); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := tables.EnsureFirst(ctx, "nat", "PREROUTING", jump); err != nil {
				t.Fatal(err)
			}
		}
		rules, err := tables.Rules(ctx, "nat", "PREROUTING")
		if err != nil {
			t.Fatal(err)
		}
		if len(rules) != 1 {
			t.Fatalf("rules: %q", rules)
		}
		if err := tables.ipt.Insert("nat", "PREROUTING", 1, "-p", "tcp", "--dport", "9", "-j", "RETURN"); err != nil {
			t.Fatal(err)
		}
		if err := tables.EnsureFirst(ctx, "nat", "PREROUTING", jump); err != nil {
			t.Fatal(err)
		}
		rules, err = tables.Rules(ctx, "nat", "PREROUTING")
		if err != nil || len(rules) != 2 || !isOurs(rules[0], "RAVEL-X") {
			t.Fatalf("rules: %q, %v", rules, err)
		}
		went, err := tables.RemoveChains(ctx, "nat", "RAVEL", false)
		if err != nil || len(went) != 2 {
			t.Fatalf("went: %q, %v", went, err)
		}
		rules, err = tables.Rules(ctx, "nat", "PREROUTING")
		if err != nil || len(rules) != 1 || isOurs(rules[0], "RAVEL-X") {
			t.Fatalf("rules: %q, %v", rules, err)
		}
	})
}

func TestDetect(t *testing.T) {
	nettest.Need(t, nettest.Root)
	v, err := Detect(t.Context())
	t.Log(v, err)
}
