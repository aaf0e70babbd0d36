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
		Foreign() []ravel.ServiceKey // services in the kernel that are not ours, as last read
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
		Changed() <-chan struct{}
	}
	vipGuard interface {
		Apply(ctx context.Context, vips []netip.Addr, claimed, foreign []ravel.ServiceKey) (guarded []netip.Addr, err error)
		Problems() []ravel.Problem
		Resync()
		Look(ctx context.Context) bool // whether rules must be mended, by the next Apply
	}
	speaker interface {
		Apply(ctx context.Context, peers []ravel.Peer, routes []ravel.Route) error
		Announced() []netip.Prefix
		Stop(ctx context.Context) error
	}
)

// DirectorConfig is what a director's loop works with.
type DirectorConfig struct {
	IPVS  ipvsTable
	Guard vipGuard
	Links vipLinks
	BGP   speaker
	// Linger is how long a VIP is served on after its route was withdrawn: routers still send for a while.
	Linger time.Duration
}

// directorWalk brings a director's kernel and routers to a state.
type directorWalk struct {
	DirectorConfig
	timeline *timeline          // nil until the kernel's table was read
	claimed  []ravel.ServiceKey // what the guard lets pass, or may
	guarded  []netip.Addr       // the VIPs that are guarded as last asked, sorted
	vips     []netip.Addr       // that our link holds
}

// step takes one walk through the safe order: withdraw what goes, close the doors of services that go, program IPVS,
// open the doors of what is there, set addresses, announce what is held.
//
// A VIP whose route goes lingers first (see timeline), so the walk that forgets its services is a later one than the
// walk that withdraws it.
func (d *directorWalk) step(ctx context.Context, want ravel.State, now time.Time) (Report, error) {
	out := map[netip.Addr]bool{}
	for _, vip := range d.announced() {
		out[vip] = true
	}
	lately := out
	if d.timeline == nil {
		found, err := d.start(ctx)
		if err != nil {
			return Report{}, err
		}
		// Routers may still send for what an earlier process announced.
		lately = found
	}
	eff, wake := d.timeline.effective(want, lately, now)
	var errs []error

	// Withdraw what goes before the kernel forgets it. What is announced already and stays is not touched.
	var staying []ravel.Route
	for _, r := range eff.Routes {
		if out[r.Prefix.Addr()] {
			staying = append(staying, r)
		}
	}
	errs = append(errs, d.BGP.Apply(ctx, eff.Peers, staying))

	effVIPs := make([]netip.Addr, 0, len(eff.Addrs))
	for _, a := range eff.Addrs {
		effVIPs = append(effVIPs, a.VIP)
	}
	vips := union(d.vips, effVIPs, netip.Addr.Compare)
	program, err := d.closeDoors(ctx, eff.Services, vips)
	errs = append(errs, err)

	held, err := d.IPVS.Apply(ctx, program)
	errs = append(errs, err)
	if errors.Is(err, director.ErrUnknown) {
		// What the kernel holds cannot be said: nothing more is changed, and nothing that is announced is withdrawn.
		return d.report(eff, d.claimed, wake), errors.Join(errs...)
	}
	d.timeline.programmed(program, held)
	errs = append(errs, d.guard(ctx, vips, held))

	// An address opens the host's sockets, so without its guard a VIP is not added.
	addrs := make([]ravel.Addr, 0, len(eff.Addrs))
	for _, a := range eff.Addrs {
		if slices.Contains(d.guarded, a.VIP) || slices.Contains(d.vips, a.VIP) {
			addrs = append(addrs, a)
		}
	}
	d.vips, err = d.Links.Apply(ctx, addrs)
	errs = append(errs, err)
	if left := union(d.vips, effVIPs, netip.Addr.Compare); len(left) != len(vips) {
		errs = append(errs, d.guard(ctx, left, held))
	}
	errs = append(errs, d.BGP.Apply(ctx, eff.Peers, announceable(eff, held, d.vips)))

	if expiry, any := d.Links.NextExpiry(); any && (wake.IsZero() || expiry.Before(wake)) {
		wake = expiry
	}
	return d.report(eff, held, wake), errors.Join(errs...)
}

// start reads what an earlier process left, and returns the VIPs that it served.
func (d *directorWalk) start(ctx context.Context) (map[netip.Addr]bool, error) {
	programmed, err := d.IPVS.Read(ctx)
	if err != nil {
		return nil, err
	}
	if d.vips, err = d.Links.Read(ctx); err != nil {
		return nil, err
	}
	found := map[netip.Addr]bool{}
	for _, s := range programmed {
		d.claimed = append(d.claimed, s.Key)
		if s.TakesNewFlows() && slices.Contains(d.vips, s.Key.VIP) {
			found[s.Key.VIP] = true
		}
	}
	d.timeline = newTimeline(d.Linger, programmed)
	return found, nil
}

// closeDoors has the guard reject what no service will claim, before the services go, and guards the VIPs that come. It
// returns the services to program: what cannot be closed is not taken away, because the host's own sockets are behind it.
func (d *directorWalk) closeDoors(ctx context.Context, services []ravel.VirtualService, vips []netip.Addr) ([]ravel.VirtualService, error) {
	stay := make(map[ravel.ServiceKey]bool, len(services))
	for _, s := range services {
		stay[s.Key] = true
	}
	for _, key := range d.IPVS.Foreign() {
		stay[key] = true
	}
	var staying, going []ravel.ServiceKey
	for _, key := range d.claimed {
		if stay[key] {
			staying = append(staying, key)
		} else {
			going = append(going, key)
		}
	}
	if len(going) == 0 && !slices.ContainsFunc(vips, func(vip netip.Addr) bool { return !slices.Contains(d.guarded, vip) }) {
		return services, nil
	}
	err := d.guard(ctx, vips, staying)
	program := services
	for _, key := range going {
		if old, programmed := d.timeline.services[key]; programmed && !slices.Contains(d.guarded, key.VIP) && slices.Contains(vips, key.VIP) {
			program = append(slices.Clip(program), old)
		}
	}
	slices.SortFunc(program, func(a, b ravel.VirtualService) int { return a.Key.Compare(b.Key) })
	return program, err
}

// guard lets just these services of the VIPs pass, and those of others in IPVS, and notes what it may let pass when that
// fails.
func (d *directorWalk) guard(ctx context.Context, vips []netip.Addr, claimed []ravel.ServiceKey) error {
	others := d.IPVS.Foreign()
	if len(others) > 0 {
		claimed = slices.DeleteFunc(slices.Clone(claimed), func(key ravel.ServiceKey) bool {
			_, foreign := slices.BinarySearchFunc(others, key, ravel.ServiceKey.Compare)
			return foreign
		})
	}
	var foreign []ravel.ServiceKey
	for _, key := range others {
		if _, ours := slices.BinarySearchFunc(vips, key.VIP, netip.Addr.Compare); ours {
			foreign = append(foreign, key)
		}
	}
	var err error
	d.guarded, err = d.Guard.Apply(ctx, vips, claimed, foreign)
	failed := map[bool]bool{} // families, by "is IPv4"
	for _, vip := range vips {
		if !slices.Contains(d.guarded, vip) {
			failed[vip.Is4()] = true
		}
	}
	earlier := slices.DeleteFunc(d.claimed, func(key ravel.ServiceKey) bool { return !failed[key.VIP.Is4()] })
	d.claimed = union(earlier, slices.Concat(claimed, foreign), ravel.ServiceKey.Compare)
	return err
}

func (d *directorWalk) report(eff ravel.State, held []ravel.ServiceKey, wake time.Time) Report {
	r := Report{
		Effective: eff, Held: held, HeldVIPs: d.vips, Announced: d.announced(), Problems: d.problems(), Wake: wake,
		Lingering: len(d.timeline.lingering),
	}
	for _, s := range eff.Services {
		for _, rs := range s.RealServers {
			switch {
			case rs.Weight > 0:
			case rs.LastWeight > 0:
				r.Draining++
			default:
				r.Rising++
			}
		}
	}
	return r
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

func (d *directorWalk) look(ctx context.Context) bool { return d.Guard.Look(ctx) }

func (d *directorWalk) changed() (ipvs, links <-chan struct{}) {
	return d.IPVS.Changed(), d.Links.Changed()
}
