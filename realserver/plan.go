package realserver

import (
	"maps"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel/internal/setdiff"
)

// transaction is what turns one ruleset into another.
type transaction struct {
	tables           map[string]map[string][]string // chains to fill anew
	dead             map[string][]string            // by table, chains that go
	used             map[string]map[string][]string // by table and chain, what keeps a dead chain from going
	changed, removed int                            // how many they are
}

// plan compares chain by chain.
func plan(have, want ruleset) transaction {
	tx := transaction{tables: map[string]map[string][]string{}, dead: map[string][]string{}}
	for _, table := range tableOrder {
		fill := map[string][]string{}
		for chain, rules := range want[table] {
			if old, there := have[table][chain]; !there || !sameRules(old, rules) {
				fill[chain] = rules
			}
		}
		if len(fill) > 0 {
			tx.tables[table] = fill
			tx.changed += len(fill)
		}
		var dead []string
		for chain := range have[table] {
			if _, wanted := want[table][chain]; !wanted {
				dead = append(dead, chain)
			}
		}
		if len(dead) > 0 {
			slices.Sort(dead)
			tx.dead[table] = dead
			tx.removed += len(dead)
		}
	}
	return tx
}

// sameRules is slices.Equal, at once for rules that were taken over from the build before.
func sameRules(a, b []string) bool {
	return setdiff.Same(a, b) || slices.Equal(a, b)
}

func (tx transaction) empty() bool { return tx.changed+tx.removed == 0 }

// text returns the input of iptables-restore --noflush: chains that are declared are made, or emptied, before they are
// filled, all in the table's one transaction. With drop, dead chains are deleted unless they
// are in use; else they are only emptied.
func (tx transaction) text(drop bool) string {
	var b strings.Builder
	for _, table := range tableOrder {
		fill, dead := tx.tables[table], tx.dead[table]
		if len(fill)+len(dead) == 0 {
			continue
		}
		b.WriteString("*" + table + "\n")
		chains := slices.Sorted(maps.Keys(fill))
		for _, chain := range chains {
			b.WriteString(":" + chain + " - [0:0]\n")
		}
		for _, chain := range dead {
			b.WriteString(":" + chain + " - [0:0]\n")
		}
		for _, chain := range chains {
			for _, rule := range fill[chain] {
				b.WriteString("-A " + chain + " " + rule + "\n")
			}
		}
		if drop {
			for _, chain := range dead {
				if len(tx.used[table][chain]) == 0 {
					b.WriteString("-X " + chain + "\n")
				}
			}
		}
		b.WriteString("COMMIT\n")
	}
	return b.String()
}
