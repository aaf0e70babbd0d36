package realserver

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
)

// forget removes the conntrack entries of UDP flows that should not go on as they are: to a pod that is no longer
// behind the redirect, which would hold the client for as long as it sends, and those of clients that sent before there
// was a rule, which would never meet it. An answer that such a pod has under way at that moment is lost. Entries of TCP flows stay: a pod that drains still answers them. What fails is
// tried again by the next Apply.
func (r *Realserver) forget(f *family, b *built) error {
	now := map[ravel.ServiceKey][]netip.AddrPort{}
	for _, o := range b.list {
		if o.redirect.Key.Proto == ravel.UDP {
			now[o.redirect.Key] = o.redirect.Pods
		}
	}
	for key, pods := range now {
		was, known := f.pods[key]
		if !known || slices.ContainsFunc(was, func(pod netip.AddrPort) bool { return !slices.Contains(pods, pod) }) {
			f.stale[key] = true
		}
	}
	for key := range f.pods {
		if _, wanted := now[key]; !wanted {
			f.stale[key] = true
		}
	}
	f.pods = now
	if len(f.stale) == 0 {
		return nil
	}
	n, err := r.net.deleteFlows(f.v6, func(key ravel.ServiceKey, server netip.AddrPort) bool {
		return f.stale[key] && !slices.Contains(now[key], server)
	})
	r.metrics.forgotten.WithLabelValues(f.name()).Add(float64(n))
	if n > 0 {
		r.log.Info("removed conntrack entries of UDP flows", "family", f.name(), "entries", n)
	}
	if err != nil {
		return fmt.Errorf("removing conntrack entries of UDP flows: %w", err)
	}
	clear(f.stale)
	return nil
}
