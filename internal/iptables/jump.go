package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"
)

// EnsureFirst sees to it that rule, a jump to a chain of ours, stands first in chain and nowhere else in it. Moving it
// is one transaction, so that packets meet it once at every moment. Other jumps in chain to the same chain of ours,
// such as an older version's, go. Another program may insert before it right after; ask again now and then.
func (t *Tables) EnsureFirst(ctx context.Context, table, chain string, rule []string) error {
	to := target(rule)
	if !ours(to) {
		return fmt.Errorf("rule %q does not jump to a chain of ours", quote(rule))
	}
	var err error
	for range tries {
		var rules []string
		if rules, err = t.Rules(ctx, table, chain); err != nil {
			return err
		}
		copies := slices.DeleteFunc(slices.Clone(rules), func(r string) bool { return !isOurs(r, to) })
		if len(copies) == 1 && isOurs(rules[0], to) {
			var same bool
			err = t.try(ctx, func(ipt *goiptables.IPTables) (err error) {
				same, err = ipt.Exists(table, chain, rule...)
				return err
			})
			if err != nil {
				return fmt.Errorf("checking %s %s %s: %w", t.family, table, chain, err)
			}
			if same {
				return nil
			}
		}
		if len(copies) == 0 {
			err = t.try(ctx, func(ipt *goiptables.IPTables) error { return ipt.Insert(table, chain, 1, rule...) })
			if err != nil {
				return fmt.Errorf("inserting into %s %s %s: %w", t.family, table, chain, err)
			}
			return nil
		}
		// The copies that there are go in the same transaction, by what they say and not by their number, which
		// other programs change.
		var tx strings.Builder
		fmt.Fprintf(&tx, "*%s\n", table)
		for _, c := range copies {
			fmt.Fprintf(&tx, "-D %s\n", strings.TrimPrefix(c, "-A "))
		}
		fmt.Fprintf(&tx, "-I %s 1 %s\nCOMMIT\n", chain, quote(rule))
		if err = t.Restore(ctx, tx.String()); err == nil {
			return nil
		}
		// Somebody may have taken a copy away since it was listed: look again.
	}
	return fmt.Errorf("moving our jump in %s %s %s: %w", t.family, table, chain, err)
}

// isOurs reports whether a printed rule jumps to the chain to.
func isOurs(rule, to string) bool { return target(Words(rule)) == to }

// Remove deletes every rule of chain that jumps where rule does. That none is there is fine.
func (t *Tables) Remove(ctx context.Context, table, chain string, rule []string) error {
	to := target(rule)
	if !ours(to) {
		return fmt.Errorf("rule %q does not jump to a chain of ours", quote(rule))
	}
	var err error
	for range tries {
		var rules []string
		if rules, err = t.Rules(ctx, table, chain); err != nil {
			return err
		}
		var tx strings.Builder
		for _, r := range rules {
			if isOurs(r, to) {
				fmt.Fprintf(&tx, "-D %s\n", strings.TrimPrefix(r, "-A "))
			}
		}
		if tx.Len() == 0 {
			return nil
		}
		if err = t.Restore(ctx, "*"+table+"\n"+tx.String()+"COMMIT\n"); err == nil {
			return nil
		}
	}
	return fmt.Errorf("removing our jump from %s %s %s: %w", t.family, table, chain, err)
}

// RemoveChains deletes every chain of one table whose name begins with prefix, itself beginning with Prefix, and every
// rule of other chains that jumps to one, in one transaction. It returns what went, or with dryRun what would go, in
// the words of iptables.
func (t *Tables) RemoveChains(ctx context.Context, table, prefix string, dryRun bool) ([]string, error) {
	if !ours(prefix) {
		return nil, fmt.Errorf("chains %s* are not ours: want a name that begins with %s", prefix, Prefix)
	}
	var err error
	for range tries {
		var lines []string
		if lines, err = t.Save(ctx, table); err != nil {
			return nil, err
		}
		var rules, declare, remove, went []string
		for _, line := range lines {
			w := Words(line)
			switch {
			case len(w) > 0 && strings.HasPrefix(w[0], ":"+prefix):
				chain := w[0][1:]
				declare = append(declare, ":"+chain+" - [0:0]")
				remove = append(remove, "-X "+chain)
			case len(w) > 2 && w[0] == "-A" && !strings.HasPrefix(w[1], prefix) && strings.HasPrefix(target(w), prefix):
				rules = append(rules, "-D "+strings.TrimPrefix(line, "-A "))
			}
		}
		for _, line := range append(slices.Clone(rules), remove...) {
			went = append(went, fmt.Sprintf("%s -t %s %s", t.family.command(), table, line))
		}
		if len(went) == 0 || dryRun {
			return went, nil
		}
		all := slices.Concat([]string{"*" + table}, declare, rules, remove, []string{"COMMIT", ""})
		if err = t.Restore(ctx, strings.Join(all, "\n")); err == nil {
			return went, nil
		}
		var failed *CommandError
		if !errors.As(err, &failed) {
			break // refused: a second look changes nothing
		}
	}
	return nil, fmt.Errorf("removing chains %s* from %s %s: %w", prefix, t.family, table, err)
}
