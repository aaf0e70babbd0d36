package agree

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/latest"
	"github.com/ravel-lb/ravel/internal/node"
)

// RealserverOptions are what a Realserver works with.
type RealserverOptions struct {
	Log    *slog.Logger
	Fleet  fleet
	Inputs node.Source[desired.Inputs] // what the documents say, without Agreed
	// Reports say which redirects are in place.
	Reports node.Source[node.Report]
	// Read tells which redirects an earlier process left.
	Read func(context.Context) ([]ravel.Redirect, error)
	// Refused tells whether redirects cannot work on this host, whatever the kernel holds: then none is told to be in place.
	// nil is never.
	Refused func() bool
	// Addrs are this host's own, by which directors may use it although the documents have it no more.
	Addrs    []netip.Addr
	SeedPort uint16
}

// Realserver ties the agent of one node to its fleet: it tells which redirects are in place, and hears which of them
// directors still use.
type Realserver struct {
	o       RealserverOptions
	results latest.Value[Result]
	seeds   []string
	said    ravel.Report // the last that was given
	last    computed
}

// NewRealserver returns the Realserver of a process.
func NewRealserver(o RealserverOptions) *Realserver { return &Realserver{o: o} }

// Results is where the newest Result is read: what the documents and the fleet come to.
func (r *Realserver) Results() *latest.Value[Result] { return &r.results }

// Run keeps the agent in step with its fleet until ctx ends.
func (r *Realserver) Run(ctx context.Context) error {
	// What an earlier life said of redirects ends here: this host may have booted since.
	r.o.Fleet.Report(ravel.Report{})
	for {
		inputsChanged, fleetChanged, heldChanged := r.o.Inputs.Changed(), r.o.Fleet.Changed(), r.o.Reports.Changed()
		r.step(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-inputsChanged:
		case <-fleetChanged:
		case <-heldChanged:
		}
	}
}

func (r *Realserver) step(ctx context.Context) {
	inputs, known := r.o.Inputs.Latest()
	if !known {
		return
	}
	if list := Seeds(inputs, r.o.SeedPort); !slices.Equal(list, r.seeds) {
		r.seeds = list
		r.o.Fleet.SetSeeds(list)
	}
	addrs := r.o.Addrs
	for _, n := range inputs.Cluster.Nodes {
		if n.Name == inputs.Node {
			r.o.Fleet.SetAddrs(n.Addrs)
			addrs = slices.Concat(n.Addrs, addrs)
		}
	}
	fleet, _ := r.o.Fleet.Latest()
	inputs.Agreed = &desired.Agreed{InUse: inUse(fleet, addrs), Unheard: !fleet.Settled}
	r.last.compute(&inputs)
	if held, known := r.held(ctx); known {
		if r.o.Refused != nil && r.o.Refused() {
			held = nil
		}
		if say := (ravel.Report{Redirects: inPlace(r.last.state.Redirects, held, r.said.Redirects)}); !sameReport(say, r.said) {
			r.said = say
			r.o.Fleet.Report(say)
		}
	}
	r.results.Set(Result{Inputs: inputs, State: r.last.state, Problems: r.last.problems, Fleet: fleet})
}

// held are the redirects that the kernel holds: as the last walk left them, and before the first one as an earlier process
// did. After a boot that is none, whatever was said in the life before.
func (r *Realserver) held(ctx context.Context) (map[ravel.ServiceKey]ravel.Redirect, bool) {
	report, walked := r.o.Reports.Latest()
	redirects, keys := report.Effective.Redirects, report.Held
	if !walked {
		var err error
		if redirects, err = r.o.Read(ctx); err != nil {
			return nil, false
		}
		for _, x := range redirects {
			keys = append(keys, x.Key)
		}
	}
	all := make(map[ravel.ServiceKey]ravel.Redirect, len(redirects))
	for _, x := range redirects {
		all[x.Key] = x
	}
	held := make(map[ravel.ServiceKey]ravel.Redirect, len(keys))
	for _, key := range keys {
		held[key] = all[key]
	}
	return held, true
}

// inPlace are the services whose redirect is wanted and held, and leads to no pod that is not wanted: a redirect that only
// lingers leads to pods that may be gone, also when new ones have come and it is not yet theirs. What was said to be in
// place is so as long as it is wanted, while its pods come and go.
func inPlace(want []ravel.Redirect, held map[ravel.ServiceKey]ravel.Redirect, said map[ravel.ServiceKey]bool) map[ravel.ServiceKey]bool {
	in := make(map[ravel.ServiceKey]bool, len(held))
	for _, w := range want {
		h, holds := held[w.Key]
		if holds && (said[w.Key] || !slices.ContainsFunc(h.Pods, func(pod ravel.LocalPod) bool { return !slices.Contains(w.Pods, pod) })) {
			in[w.Key] = true
		}
	}
	return in
}

// inUse are the services for which a director's kernel has this node: of every director that is there, and of those
// that went without a goodbye, for they may only be out of hearing.
func inUse(fleet ravel.Fleet, addrs []netip.Addr) []ravel.ServiceKey {
	var keys []ravel.ServiceKey
	for _, m := range fleet.Members {
		if m.Role != ravel.Director || m.State == ravel.Left {
			continue
		}
		for _, addr := range addrs {
			keys = append(keys, fleet.Reports[m.Name].Uses[addr]...)
		}
	}
	slices.SortFunc(keys, ravel.ServiceKey.Compare)
	return slices.Compact(keys)
}
