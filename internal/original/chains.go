package original

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel/internal/iptables"
)

// DefaultChain is the original's base chain unless --iptables-chain named another.
const DefaultChain = "RAVEL"

// table is the only one that the original writes to.
const table = "nat"

// goodBase is a name that the original could have been given; with its longest suffix it fits the kernel's 28 characters.
var goodBase = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,7}$`)

// notIts are chains of others, which the original's way of naming would mistake for its own: kube-proxy's are made just
// like it, and are hashed alike.
var notIts = []string{"KUBE", "PREROUTING", "INPUT", "OUTPUT", "POSTROUTING", "FORWARD", "DOCKER", "CNI", "cali"}

// CheckChain returns what is wrong with the name of a base chain.
func CheckChain(base string) error {
	if !goodBase.MatchString(base) {
		return fmt.Errorf("iptables chain %q: want the name that the original was given, 1 to 7 letters and digits", base)
	}
	if slices.Contains(notIts, base) {
		return fmt.Errorf("iptables chain %q: chains of this name are not the original's", base)
	}
	return nil
}

// chains are the names that the original gives to its chains, under one base.
type chains struct {
	base, masq string
	service    *regexp.Regexp // picks the pod of one service and protocol
	pod        *regexp.Regexp // hands packets to one pod

	ourOwn *regexp.Regexp // of Ravel, under the same base: its presence says that Ravel took the place
}

// The original hashes to 16 characters of base32, Ravel to 12.
func newChains(base string) chains {
	q := regexp.QuoteMeta(base)
	return chains{
		base: base, masq: base + "-MASQ",
		service: regexp.MustCompile("^" + q + "-SVC-[A-Z2-7]{16}$"),
		pod:     regexp.MustCompile("^" + q + "-SEP-[A-Z2-7]{16}$"),
		ourOwn:  regexp.MustCompile("^" + q + "-(REST|POST|(VIP|SVC)-[A-Z2-7]{12})$"),
	}
}

// holds reports whether all rules of a chain are of the kind that the original writes into a chain of this name. One
// without rules is.
func (c chains) holds(chain string, rules [][]string) bool {
	var may func(to string) bool
	switch {
	case chain == c.base:
		may = func(to string) bool { return to == c.masq || c.service.MatchString(to) }
	case chain == c.masq:
		may = func(to string) bool { return to == "MARK" }
	case c.service.MatchString(chain):
		may = c.pod.MatchString
	case c.pod.MatchString(chain):
		may = func(to string) bool { return to == c.masq || to == "DNAT" }
	default:
		return false
	}
	return !slices.ContainsFunc(rules, func(rule []string) bool { return !may(target(rule)) })
}

// target returns where a rule leads, "" if nowhere.
func target(rule []string) string {
	for i := 0; i+1 < len(rule); i++ {
		switch rule[i] {
		case "-j", "-g":
			return rule[i+1]
		case "--comment":
			i++ // its text may hold anything
		}
	}
	return ""
}

// removal is what is to be done to a table.
type removal struct {
	jumps  []string            // rules of PREROUTING that lead to the base chain, as saved
	chains []string            // those that go
	used   map[string][]string // those of them that rules of others lead to, by chain, so that they stay, empty
}

// look reads from the lines of iptables-save what of one base is there. With keep, or where Ravel has its own chains
// under the base, the base chain and the one that marks are Ravel's now, and the jump too.
func (c chains) look(lines []string, keep bool) removal {
	rules := map[string][][]string{}
	var order []string
	for _, line := range lines {
		w := iptables.Words(line)
		switch {
		case len(w) > 0 && strings.HasPrefix(w[0], ":"):
			order = append(order, w[0][1:])
		case len(w) > 2 && w[0] == "-A":
			rules[w[1]] = append(rules[w[1]], w[2:])
		}
	}
	keep = keep || slices.ContainsFunc(order, c.ourOwn.MatchString)
	r := removal{used: map[string][]string{}}
	for _, chain := range order {
		if c.holds(chain, rules[chain]) && (!keep || chain != c.base && chain != c.masq) {
			r.chains = append(r.chains, chain)
		}
	}
	for _, line := range lines {
		w := iptables.Words(line)
		if len(w) < 3 || w[0] != "-A" || slices.Contains(r.chains, w[1]) {
			continue
		}
		switch to := target(w); {
		case !slices.Contains(r.chains, to):
		case to == c.base && slices.Equal(w, []string{"-A", "PREROUTING", "-j", c.base}):
			r.jumps = append(r.jumps, line)
		default:
			r.used[to] = append(r.used[to], line)
		}
	}
	return r
}

// input returns the transaction for iptables-restore.
func (r removal) input() string {
	var b strings.Builder
	b.WriteString("*" + table + "\n")
	for _, chain := range r.chains {
		b.WriteString(":" + chain + " - [0:0]\n") // empties it
	}
	for _, jump := range r.jumps {
		b.WriteString("-D " + strings.TrimPrefix(jump, "-A ") + "\n")
	}
	for _, chain := range r.chains {
		if len(r.used[chain]) == 0 {
			b.WriteString("-X " + chain + "\n")
		}
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// RemoveChains removes the chains that the original made under a base, and the jump to them, in one transaction, and
// returns what went, or with dryRun what would go, a line each in the words of iptables. keep says that Ravel runs here,
// whose own chains stand under the same names: then the base chain, the one that marks, and the jump stay.
//
// A chain of such a name stays that holds a rule which the original does not write. A chain that a rule of somebody else
// leads to is emptied and stays; the error names the rule.
func RemoveChains(ctx context.Context, t *iptables.Tables, base string, keep, dryRun bool) ([]string, error) {
	if err := CheckChain(base); err != nil {
		return nil, err
	}
	c := newChains(base)
	const tries = 4 // others may change what we looked at
	var err error
	for range tries {
		lines, readErr := t.Save(ctx, table)
		if readErr != nil {
			return nil, fmt.Errorf("reading the %s table of %s: %w", table, t.Family(), readErr)
		}
		r := c.look(lines, keep)
		if len(r.chains) == 0 {
			return nil, nil
		}
		if !dryRun {
			err = t.RestoreOf(ctx, r.input(), func(chain string) bool { return slices.Contains(r.chains, chain) })
			if err != nil && ctx.Err() == nil {
				continue
			}
			if err != nil {
				break
			}
		}
		return r.said(t.Family(), dryRun)
	}
	return nil, fmt.Errorf("removing the original's chains from %s of %s: %w", table, t.Family(), err)
}

// said tells what was done, or would be.
func (r removal) said(family iptables.Family, dryRun bool) (done []string, err error) {
	command := "iptables"
	if family == iptables.V6 {
		command = "ip6tables"
	}
	var errs []error
	for _, jump := range r.jumps {
		done = append(done, fmt.Sprintf("%s -t %s -D %s", command, table, strings.TrimPrefix(jump, "-A ")))
	}
	for _, chain := range r.chains {
		by := r.used[chain]
		if len(by) == 0 {
			done = append(done, fmt.Sprintf("%s -t %s -X %s", command, table, chain))
			continue
		}
		done = append(done, fmt.Sprintf("%s -t %s -F %s # stays, empty: in use by %s", command, table, chain, strings.Join(by, "; ")))
		if !dryRun {
			errs = append(errs, fmt.Errorf("%s %s stays, empty: a rule that is not the original's leads to it: %s", table, chain, strings.Join(by, "; ")))
		}
	}
	return done, errors.Join(errs...)
}
