package realserver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Cleanup removes all that is ours: the jumps first, so that packets stop meeting our chains, then the chains, then what
// the tunnel devices got from us. It returns what went, or with dryRun what would go, a line each in the words of the
// tool. The sysctls are for their Setter to put back. Established flows go on as far as the host's own rules let them.
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
		device := wanted{v6: f.v6}.device()
		lines, err = r.net.stopTunnel(device, dryRun)
		done = append(done, lines...)
		if err != nil {
			errs = append(errs, fmt.Errorf("cleaning up %s: %w", device, err))
		}
	}
	return done, errors.Join(errs...)
}

func (r *Realserver) cleanFamily(ctx context.Context, f *family, dryRun bool) ([]string, error) {
	if err := r.look(ctx, f); err != nil {
		return nil, err
	}
	command := "iptables"
	if f.v6 {
		command = "ip6tables"
	}
	var done []string
	hooks := r.names.hooks()
	slices.Reverse(hooks) // what redirects goes before what lets pass
	for _, h := range hooks {
		if _, there := f.have[h.table][h.to]; !there {
			continue
		}
		done = append(done, fmt.Sprintf("%s -t %s -D %s -j %s", command, h.table, h.chain, h.to))
		if dryRun {
			continue
		}
		if err := f.tables.Remove(ctx, h.table, h.chain, []string{"-j", h.to}); err != nil {
			return done, err
		}
	}
	for _, table := range tableOrder {
		for _, chain := range slices.Sorted(maps.Keys(f.have[table])) {
			done = append(done, fmt.Sprintf("%s -t %s -X %s", command, table, chain))
		}
	}
	if dryRun || len(done) == 0 {
		return done, nil
	}
	tx := plan(f.have, ruleset{})
	if err := f.tables.Restore(ctx, tx.text(true)); err != nil {
		f.known = false
		return done, err
	}
	f.have, f.known, f.hooked, f.built, f.held = ruleset{}, true, false, nil, nil
	err := r.forget(f, &built{})
	return done, err
}
