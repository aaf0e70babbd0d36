package realserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

// Cleanup removes all that is ours, also what a run with another Chain left: the jumps first, so that packets stop meeting our chains, then the chains, then what
// the tunnel devices got from us. It returns what went, or with dryRun what would go, a line each in the words of the
// tool. A chain that another program's rule leads to cannot go: it is emptied, and the error names the rule. The sysctls are for their Setter to put back. Established flows go on as far as the host's own rules let them.
func (r *Realserver) Cleanup(ctx context.Context, dryRun bool) ([]string, error) {
	r.applying.Lock()
	defer r.applying.Unlock()
	var done []string
	var errs []error
	for _, f := range r.families {
		lines, err := r.cleanFamily(ctx, f, dryRun)
		done = append(done, lines...)
		if err != nil {
			errs = append(errs, fmt.Errorf("cleaning up %s: %w", f.name(), err))
		}
		if f.early != nil {
			lines, err = f.early.Remove(dryRun)
			done = append(done, lines...)
			if err != nil {
				errs = append(errs, fmt.Errorf("cleaning up %s: %w", f.name(), err))
			}
		}
		device := wanted{v6: f.v6}.device()
		lines, err = r.net.stopTunnel(device, dryRun)
		done = append(done, lines...)
		if err != nil {
			errs = append(errs, fmt.Errorf("cleaning up %s: %w", device, err))
		}
	}
	return done, errors.Join(errs...)
}

// cleanFamily removes the chains of every base, so also those of a run with another setting.
func (r *Realserver) cleanFamily(ctx context.Context, f *family, dryRun bool) ([]string, error) {
	if err := r.look(ctx, f); err != nil {
		return nil, err
	}
	command := "iptables"
	if f.v6 {
		command = "ip6tables"
	}
	left, err := r.leftovers(ctx, f)
	if err != nil {
		return nil, err
	}
	var done []string
	var errs []error
	for _, n := range left.names {
		hooks := n.hooks()
		slices.Reverse(hooks) // what redirects goes before what lets pass
		for _, h := range hooks {
			if !left.hooked[h] {
				continue
			}
			if !dryRun {
				if err := f.tables.Remove(ctx, h.table, h.chain, []string{"-j", h.to}); err != nil {
					errs = append(errs, err)
					continue
				}
			}
			done = append(done, fmt.Sprintf("%s -t %s -D %s -j %s", command, h.table, h.chain, h.to))
		}
	}
	tx := plan(left.have, ruleset{})
	if tx.empty() {
		return done, errors.Join(errs...)
	}
	tx.used = left.used
	emptied := false
	if !dryRun {
		err := f.tables.Restore(ctx, tx.text(true))
		if err != nil && ctx.Err() == nil {
			// A rule of another program may have come since we looked. What it leads to cannot go, but can be emptied.
			if f.tables.Restore(ctx, tx.text(false)) == nil {
				err, emptied = fmt.Errorf("chains of ours are in use by others and stay, empty: %w", err), true
			}
		}
		if err != nil {
			errs = append(errs, err)
		}
		if err != nil && !emptied {
			f.known = false
			return done, errors.Join(errs...)
		}
	}
	for _, table := range tableOrder {
		for _, chain := range tx.dead[table] {
			line := fmt.Sprintf("%s -t %s -X %s", command, table, chain)
			switch by := left.used[table][chain]; {
			case len(by) > 0:
				line = fmt.Sprintf("%s -t %s -F %s # in use by another program: %s", command, table, chain, strings.Join(by, "; "))
				if !dryRun {
					errs = append(errs, fmt.Errorf("%s %s stays, empty: another program's rule leads to it: %s", table, chain, strings.Join(by, "; ")))
				}
			case emptied:
				line = fmt.Sprintf("%s -t %s -F %s", command, table, chain)
			}
			done = append(done, line)
		}
	}
	if dryRun {
		return done, errors.Join(errs...)
	}
	f.have, f.known, f.hooked, f.built, f.held = ruleset{}, len(errs) == 0, false, nil, nil
	for _, n := range left.names {
		for key := range redirectsIn(left.have["nat"], n) {
			if key.Proto == ravel.UDP {
				f.stale[key] = true
			}
		}
	}
	errs = append(errs, r.forget(f, &built{}))
	return done, errors.Join(errs...)
}

// retire takes away what a run with another base left in nat and mangle, once ours stand: its redirects lead to the pods of
// that time, and it knows the directors of that time. What lets packets pass, in filter, stays until cleanup, for flows
// that began with it.
func (r *Realserver) retire(ctx context.Context) error {
	var errs []error
	for _, f := range r.families {
		left, err := r.leftovers(ctx, f)
		if err != nil {
			return err
		}
		gone := ruleset{"mangle": {}, "nat": {}}
		for _, n := range left.names {
			if n.base == r.names.base {
				continue
			}
			for _, h := range slices.Backward(n.hooks()) {
				if h.table != "filter" && left.hooked[h] {
					errs = append(errs, f.tables.Remove(ctx, h.table, h.chain, []string{"-j", h.to}))
				}
			}
			for table := range gone {
				for chain, rules := range left.have[table] {
					if n.ours(table, chain) {
						gone[table][chain] = rules
					}
				}
			}
		}
		if tx := plan(gone, ruleset{}); !tx.empty() {
			tx.used = left.used
			r.log.Info("rules of a run with another --iptables-chain go", "family", f.name(), "chains", tx.removed)
			errs = append(errs, f.tables.Restore(ctx, tx.text(true)))
		}
	}
	return errors.Join(errs...)
}

// leftovers are all that is ours in one family's tables, under whatever base.
type leftovers struct {
	names  []names
	have   ruleset
	hooked map[hook]bool                  // the jumps that are there
	used   map[string]map[string][]string // by table and chain: rules of others that lead there
}

// leftovers reads the tables.
func (r *Realserver) leftovers(ctx context.Context, f *family) (leftovers, error) {
	left := leftovers{have: ruleset{}, hooked: map[hook]bool{}, used: map[string]map[string][]string{}}
	saved := map[string][]string{}
	bases := map[string]bool{r.names.base: true}
	for _, table := range tableOrder {
		lines, err := f.tables.Save(ctx, table)
		if err != nil {
			return left, fmt.Errorf("reading the %s table: %w", table, err)
		}
		saved[table] = lines
		for _, base := range basesIn(table, lines) {
			bases[base] = true
		}
	}
	jumps := map[hook]hook{} // of all bases, known by where they are, so without "before"
	for _, base := range slices.Sorted(maps.Keys(bases)) {
		n, err := newNames(base)
		if err != nil {
			return left, err
		}
		left.names = append(left.names, n)
		for _, h := range n.hooks() {
			jumps[hook{table: h.table, chain: h.chain, to: h.to}] = h
		}
	}
	for _, table := range tableOrder {
		ours := func(chain string) bool {
			return slices.ContainsFunc(left.names, func(n names) bool { return n.ours(table, chain) })
		}
		chains := parseSaved(saved[table], ours)
		if len(chains) == 0 {
			continue
		}
		left.have[table] = chains
		left.used[table] = map[string][]string{}
		for _, line := range saved[table] {
			w := iptables.Words(line)
			if len(w) < 3 || w[0] != "-A" || ours(w[1]) {
				continue
			}
			to := cmp.Or(argument(w, "-j"), argument(w, "-g"))
			if _, there := chains[to]; !there {
				continue
			}
			if h, made := jumps[hook{table: table, chain: w[1], to: to}]; made {
				left.hooked[h] = true
				continue
			}
			left.used[table][to] = append(left.used[table][to], line)
		}
	}
	return left, nil
}
