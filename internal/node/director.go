package node

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
)

// The appliers of a director, as this package uses them. director, guard, ifaddr and bgp have the real ones.
type (
	ipvsTable interface {
		Apply(ctx context.Context, want []ravel.VirtualService) (held []ravel.ServiceKey, err error)
		Read(ctx context.Context) ([]ravel.VirtualService, error)
		Problems() []ravel.Problem
		Resync()
		Changed() <-chan struct{}
	}
	vipLinks interface {
		Apply(ctx context.Context, want []ravel.Addr) (held []netip.Addr, err error)
		Read(ctx context.Context) ([]netip.Addr, error) // what our link holds, as a restart finds it
		NextExpiry() (time.Time, bool)
		Problems() []ravel.Problem
		Resync()
	}
	vipGuard interface {
		Apply(ctx context.Context, vips []netip.Addr, claimed []ravel.ServiceKey) error
		Problems() []ravel.Problem
		Resync()
	}
	speaker interface {
		Apply(ctx context.Context, peers []ravel.Peer, routes []ravel.Route) error
		Announced() []netip.Prefix
		Stop(ctx context.Context) error
	}
)

// DirectorConfig is what a director's loop works with.
type DirectorConfig struct {
	IPVS   ipvsTable
	Guard  vipGuard
	Links  vipLinks
	BGP    speaker
	Timing Timing
}

// directorWalk brings a director's kernel and routers to a state.
type directorWalk struct {
	DirectorConfig
	timeline *timeline          // nil until the kernel's table was read
	claimed  []ravel.ServiceKey // what the guard lets pass, or may
	vips     []netip.Addr       // that our link holds
}

// step takes one walk through the safe order: withdraw what goes, close what no service will claim, program IPVS,
// open what is claimed, set addresses, announce what is held.
//
// A VIP whose route goes lingers first (see timeline), so the walk that forgets its services is a later one than the
// walk that withdraws it.
func (d *directorWalk) step(ctx context.Context, want ravel.State, now time.Time) (Report, error) {
	if d.timeline == nil {
		programmed, err := d.IPVS.Read(ctx)
		if err != nil {
			return Report{}, err
		}
		if d.vips, err = d.Links.Read(ctx); err != nil {
			return Report{}, err
		}
		d.timeline = newTimeline(d.Timing, programmed)
		for _, s := range programmed {
			d.claimed = append(d.claimed, s.Key)
		}
	}
	out := map[netip.Addr]bool{}
	for _, vip := range d.announced() {
		out[vip] = true
	}
	eff, wake := d.timeline.effective(want, out, now)
	var errs []error

	// Withdraw what goes before the kernel forgets it. What is announced already and stays is not touched.
	var staying []ravel.Route
	for _, r := range eff.Routes {
		if out[r.Prefix.Addr()] {
			staying = append(staying, r)
		}
	}
	errs = append(errs, d.BGP.Apply(ctx, eff.Peers, staying))

	// A door is closed before the service behind it goes, and opened when it is there.
	effVIPs := make([]netip.Addr, 0, len(eff.Addrs))
	for _, a := range eff.Addrs {
		effVIPs = append(effVIPs, a.VIP)
	}
	all := union(d.vips, effVIPs, netip.Addr.Compare)
	effKeys := make([]ravel.ServiceKey, 0, len(eff.Services))
	for _, s := range eff.Services {
		effKeys = append(effKeys, s.Key)
	}
	closing := len(intersection(d.claimed, effKeys)) < len(d.claimed)
	if err := d.guard(ctx, all, intersection(d.claimed, effKeys)); err != nil {
		errs = append(errs, err)
		if closing {
			// What cannot be closed is not taken away: the host's own sockets are behind it.
			return Report{Effective: eff, Held: d.claimed, HeldVIPs: d.vips, Announced: d.announced(), Wake: wake, Problems: d.problems()},
				errors.Join(errs...)
		}
	}

	held, err := d.IPVS.Apply(ctx, eff.Services)
	errs = append(errs, err)
	if errors.Is(err, director.ErrUnknown) {
		// What the kernel holds cannot be said: nothing more is changed, and nothing that is announced is withdrawn.
		return Report{Effective: eff, Held: d.claimed, HeldVIPs: d.vips, Announced: d.announced(), Wake: wake, Problems: d.problems()},
			errors.Join(errs...)
	}
	d.timeline.programmed(eff.Services, held)

	guarded := d.guard(ctx, all, held)
	errs = append(errs, guarded)

	// An address opens the host's sockets, so without its guard a VIP is not added.
	addrs := eff.Addrs
	if guarded != nil {
		addrs = nil
		for _, a := range eff.Addrs {
			if slices.Contains(d.vips, a.VIP) {
				addrs = append(addrs, a)
			}
		}
	}
	heldVIPs, err := d.Links.Apply(ctx, addrs)
	errs = append(errs, err)
	d.vips = heldVIPs
	if vips := union(heldVIPs, effVIPs, netip.Addr.Compare); guarded == nil && len(vips) != len(all) {
		errs = append(errs, d.guard(ctx, vips, held))
	}

	routes := announceable(eff, held, heldVIPs)
	errs = append(errs, d.BGP.Apply(ctx, eff.Peers, routes))

	if expiry, any := d.Links.NextExpiry(); any && (wake.IsZero() || expiry.Before(wake)) {
		wake = expiry
	}
	return Report{
		Effective: eff, Held: held, HeldVIPs: heldVIPs, Announced: d.announced(), Problems: d.problems(), Wake: wake,
		Lingering: len(d.timeline.lingering), Draining: len(d.timeline.draining), Rising: len(d.timeline.rising),
	}, errors.Join(errs...)
}

// announced lists the VIPs whose routes are out.
func (d *directorWalk) announced() []netip.Addr {
	var vips []netip.Addr
	for _, prefix := range d.BGP.Announced() {
		vips = append(vips, prefix.Addr())
	}
	return vips
}

func (d *directorWalk) problems() []ravel.Problem {
	return slices.Concat(d.IPVS.Problems(), d.Links.Problems(), d.Guard.Problems())
}

// guard lets just the claimed services of the VIPs pass, and notes what it may let pass when that fails.
func (d *directorWalk) guard(ctx context.Context, vips []netip.Addr, claimed []ravel.ServiceKey) error {
	err := d.Guard.Apply(ctx, vips, claimed)
	if err != nil {
		claimed = union(d.claimed, claimed, ravel.ServiceKey.Compare)
	}
	d.claimed = claimed
	return err
}

// announceable returns the routes whose VIP is held by a link and whose services are all in the kernel.
func announceable(eff ravel.State, held []ravel.ServiceKey, heldVIPs []netip.Addr) []ravel.Route {
	inKernel := make(map[ravel.ServiceKey]bool, len(held))
	for _, k := range held {
		inKernel[k] = true
	}
	missing := map[netip.Addr]bool{}
	for _, s := range eff.Services {
		if !inKernel[s.Key] {
			missing[s.Key.VIP] = true
		}
	}
	onLink := make(map[netip.Addr]bool, len(heldVIPs))
	for _, v := range heldVIPs {
		onLink[v] = true
	}
	var routes []ravel.Route
	for _, r := range eff.Routes {
		if vip := r.Prefix.Addr(); onLink[vip] && !missing[vip] {
			routes = append(routes, r)
		}
	}
	return routes
}

// stop withdraws every route and ends the sessions. IPVS and addresses stay: what routers still send is served.
func (d *directorWalk) stop(ctx context.Context) error { return d.BGP.Stop(ctx) }

func (d *directorWalk) resync() {
	d.IPVS.Resync()
	d.Guard.Resync()
	d.Links.Resync()
}

func (d *directorWalk) changed() <-chan struct{} { return d.IPVS.Changed() }
