package node

import (
	"net/netip"
	"slices"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
)

// timeline bends the wanted state by time: a VIP whose route went is served on for a while. It is pure: the clock and
// what is announced are parameters. Its methods are for one goroutine.
type timeline struct {
	wait time.Duration // how long a VIP lingers

	services  map[ravel.ServiceKey]ravel.VirtualService // what was programmed last
	lingering map[netip.Addr]linger                     // VIPs without a route that are served as they were
}

// linger is the time for which a VIP without a route is served as it was.
type linger struct {
	until time.Time
	// swap says that the VIP is still wanted, but by services of which none that takes flows now will take them then:
	// it is announced again when they are programmed.
	swap bool
}

// newTimeline begins with what the kernel holds already.
func newTimeline(wait time.Duration, programmed []ravel.VirtualService) *timeline {
	t := &timeline{
		wait:      wait,
		services:  make(map[ravel.ServiceKey]ravel.VirtualService, len(programmed)),
		lingering: map[netip.Addr]linger{},
	}
	for _, s := range programmed {
		t.services[s.Key] = s
	}
	return t
}

// effective returns what should be true at this moment on the way to want, and when to ask again; the zero time
// means not before want changes. announced are the VIPs whose routes are out now.
func (t *timeline) effective(want ravel.State, announced map[netip.Addr]bool, now time.Time) (ravel.State, time.Time) {
	for vip, l := range t.lingering {
		if !now.Before(l.until) {
			delete(t.lingering, vip)
		}
	}
	routed := make(map[netip.Addr]bool, len(want.Routes))
	for _, r := range want.Routes {
		vip := r.Prefix.Addr()
		routed[vip] = true
		if !t.lingering[vip].swap {
			delete(t.lingering, vip)
		}
	}
	t.startLingers(announced, now, false, func(vip netip.Addr) bool { return !routed[vip] })

	// A swap is judged anew each time: what is wanted may be what is programmed again.
	swaps := map[netip.Addr]linger{}
	for vip, l := range t.lingering {
		if l.swap && routed[vip] {
			swaps[vip] = l
			delete(t.lingering, vip)
		}
	}
	services := t.bend(want.Services)
	unbridged := t.unbridged(services)
	again := t.startLingers(announced, now, true, unbridged)
	for vip, l := range swaps {
		if unbridged(vip) {
			t.lingering[vip], again = l, true
		}
	}
	if again {
		services = t.bend(want.Services)
	}
	eff := want
	eff.Services = services
	eff.Addrs = t.lingeringAddrs(want.Addrs)
	eff.Routes = slices.DeleteFunc(servable(want.Routes, services), func(r ravel.Route) bool {
		_, lingers := t.lingering[r.Prefix.Addr()]
		return lingers
	})

	return eff, t.next()
}

// programmed notes what the kernel now holds of services: those that held names as they are there, the others as they
// were before, because an edit that failed may have left either.
func (t *timeline) programmed(services []ravel.VirtualService, held []ravel.ServiceKey) {
	before := t.services
	t.services = make(map[ravel.ServiceKey]ravel.VirtualService, len(services))
	for _, s := range services {
		t.services[s.Key] = s
	}
	if len(held) == len(services) {
		return
	}
	inKernel := make(map[ravel.ServiceKey]bool, len(held))
	for _, key := range held {
		inKernel[key] = true
	}
	for key := range t.services {
		if inKernel[key] {
			continue
		}
		delete(t.services, key)
		if was, existed := before[key]; existed {
			t.services[key] = was
		}
	}
}

// startLingers begins the linger of the announced VIPs that leave says, and reports whether there were any.
func (t *timeline) startLingers(announced map[netip.Addr]bool, now time.Time, swap bool, leave func(netip.Addr) bool) bool {
	began := false
	for vip := range announced {
		if _, already := t.lingering[vip]; !already && leave(vip) {
			t.lingering[vip] = linger{now.Add(t.wait), swap}
			began = true
		}
	}
	return began
}

// unbridged tells the VIPs of which no service takes new flows both as programmed and in services. On the way from
// the one to the other there would be a moment with none, so their routes must go first.
func (t *timeline) unbridged(services []ravel.VirtualService) func(netip.Addr) bool {
	bridged := map[netip.Addr]bool{}
	for _, s := range services {
		if s.TakesNewFlows() && t.services[s.Key].TakesNewFlows() {
			bridged[s.Key.VIP] = true
		}
	}
	return func(vip netip.Addr) bool { return !bridged[vip] }
}

// bend returns the services to program now.
func (t *timeline) bend(want []ravel.VirtualService) []ravel.VirtualService {
	services := make([]ravel.VirtualService, 0, len(want))
	for _, s := range want {
		if _, lingers := t.lingering[s.Key.VIP]; lingers {
			continue
		}
		if _, programmed := t.services[s.Key]; !programmed && s.Coming {
			continue // it comes when it can take flows: a VIP that wants all of its services is not withdrawn for it
		}
		services = append(services, s)
	}
	// A VIP that lingers is served exactly as it was, also by services that are wanted no more.
	if len(t.lingering) > 0 {
		for key, s := range t.services {
			if _, lingers := t.lingering[key.VIP]; lingers {
				services = append(services, s)
			}
		}
		slices.SortFunc(services, func(a, b ravel.VirtualService) int { return a.Key.Compare(b.Key) })
	}
	return services
}

func (t *timeline) lingeringAddrs(want []ravel.Addr) []ravel.Addr {
	if len(t.lingering) == 0 {
		return want
	}
	addrs := slices.Clone(want)
	for vip := range t.lingering {
		addrs = append(addrs, ravel.Addr{VIP: vip})
	}
	slices.SortFunc(addrs, ravel.Addr.Compare)
	return slices.Compact(addrs)
}

func (t *timeline) next() time.Time {
	var next time.Time
	for _, l := range t.lingering {
		if next.IsZero() || l.until.Before(next) {
			next = l.until
		}
	}
	return next
}

// servable returns the routes whose VIP these services serve (promise P1).
func servable(routes []ravel.Route, services []ravel.VirtualService) []ravel.Route {
	byVIP := make(map[netip.Addr][]ravel.VirtualService, len(routes))
	for run := range desired.ByVIP(services) {
		byVIP[run[0].Key.VIP] = run
	}
	kept := make([]ravel.Route, 0, len(routes))
	for _, r := range routes {
		if run := byVIP[r.Prefix.Addr()]; len(run) > 0 && desired.Served(run, r.NeedsAll) {
			kept = append(kept, r)
		}
	}
	return kept
}
