package realserver

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel/internal/iptables"
)

// hook puts our jumps into the kernel's chains: what lets packets through before what redirects them.
func (r *Realserver) hook(ctx context.Context, f *family) error {
	for _, h := range r.names.hooks() {
		if _, there := f.have[h.table][h.to]; !there {
			continue
		}
		rules, err := f.tables.Rules(ctx, h.table, h.chain)
		if err == nil && !h.stands(rules) {
			err = f.tables.EnsureFirst(ctx, h.table, h.chain, []string{"-j", h.to})
		}
		if err != nil {
			return fmt.Errorf("jumping from %s %s to %s: %w", h.table, h.chain, h.to, err)
		}
	}
	return nil
}

// Look reports whether our jump in nat PREROUTING must be mended, which the next Apply then does: because it is gone, or
// because another program's rule stands before it. kube-proxy puts its own first whenever that is missing, as after a
// restart or when somebody flushed the table. While nobody changes rules a Look costs some microseconds, otherwise the
// reading of that chain.
func (r *Realserver) Look(ctx context.Context) bool {
	r.applying.Lock()
	defer r.applying.Unlock()
	h := r.names.redirecting()
	mend := false
	for _, f := range r.families {
		if _, there := f.have[h.table][h.to]; !there || !f.known || !f.hooked {
			continue // nothing to look for, or looked for by the next Apply anyhow
		}
		if f.forestalls(r.names) {
			r.log.Info("kube-proxy's nftables came or went, or our own table was removed", "family", f.name())
			mend = true
		}
		stamp, err := f.tables.Stamp(h.table)
		if err != nil || stamp == f.stamp {
			continue // the next Resync looks
		}
		rules, err := f.tables.Rules(ctx, h.table, h.chain)
		if err != nil {
			continue
		}
		f.stamp = stamp // of before the rules were read, so that what changed meanwhile is looked at again
		if h.stands(rules) {
			continue
		}
		// Who took our jump away most likely took more.
		f.hooked, f.known = false, slices.ContainsFunc(rules, h.ours)
		r.metrics.overtaken.WithLabelValues(f.name()).Inc()
		r.log.Warn("another program's rule stood before our jump, or it was gone", "family", f.name(), "chain", h.chain)
		mend = true
	}
	return mend
}

// ours reports whether a printed rule is a jump to the hook's chain.
func (h hook) ours(rule string) bool { return argument(iptables.Words(rule), "-j") == h.to }

// stands reports whether our jump stands once among the rules of its chain, as it should be, and where it should.
//
// A jump that need not be first stands before the first one to h.before, and before what takes packets for any address
// of the host: kube-proxy's node ports do by its jump, but those of containers (Docker, the portmap plugin) by their own.
// Before any other stand jumps to chains of Ravel's alone: the guard of the VIPs wants to be first in INPUT too.
func (h hook) stands(rules []string) bool {
	at := slices.Index(rules, "-A "+h.chain+" -j "+h.to)
	if at < 0 || slices.ContainsFunc(rules[at+1:], h.ours) {
		return false
	}
	return !slices.ContainsFunc(rules[:at], func(rule string) bool {
		w := iptables.Words(rule)
		to := argument(w, "-j")
		if h.before == "" {
			return to == h.to || !strings.HasPrefix(to, iptables.Prefix)
		}
		return to == h.to || to == h.before || argument(w, "-g") == h.before || argument(w, "--dst-type") == "LOCAL"
	})
}
