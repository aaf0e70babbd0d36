package node

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
)

// Timing is how long a director holds what goes, and holds back what comes.
type Timing struct {
	// Linger is how long a VIP is served on after its route was withdrawn: routers still send for a while.
	Linger time.Duration
	// Drain is how long a real server that left a service keeps its flows, at weight 0.
	Drain time.Duration
	// Rise is how long a real server waits before its first new flow, so that its node has the redirect by then.
	Rise time.Duration
}

// timeline bends the wanted state by time. It is pure: the clock and what is announced are parameters. Its methods
// are for one goroutine.
type timeline struct {
	timing Timing

	services  map[ravel.ServiceKey]ravel.VirtualService // what was programmed last
	lingering map[netip.Addr]linger                     // VIPs without a route that are served as they were
	draining  map[serverRef]time.Time                   // until when a real server that left is kept
	rising    map[serverRef]time.Time                   // from when on a real server takes new flows
}

// linger is the time for which a VIP without a route is served as it was.
type linger struct {
	until time.Time
	// swap says that the VIP is still wanted, but by services of which none that takes flows now will take them then:
	// it is announced again when they are programmed.
	swap bool
}

// serverRef names one real server of one service.
type serverRef struct {
	key  ravel.ServiceKey
	addr netip.Addr
}

// newTimeline begins with what the kernel holds already: none of that has to wait to rise.
func newTimeline(timing Timing, programmed []ravel.VirtualService) *timeline {
	t := &timeline{
		timing:    timing,
		services:  make(map[ravel.ServiceKey]ravel.VirtualService, len(programmed)),
		lingering: map[netip.Addr]linger{},
		draining:  map[serverRef]time.Time{},
		rising:    map[serverRef]time.Time{},
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
	services := t.bend(want.Services, now)
	unbridged := t.unbridged(services)
	again := t.startLingers(announced, now, true, unbridged)
	for vip, l := range swaps {
		if unbridged(vip) {
			t.lingering[vip], again = l, true
		}
	}
	if again {
		services = t.bend(want.Services, now)
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
			t.lingering[vip] = linger{now.Add(t.timing.Linger), swap}
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
func (t *timeline) bend(want []ravel.VirtualService, now time.Time) []ravel.VirtualService {
	rising := make(map[serverRef]time.Time, len(t.rising))
	draining := make(map[serverRef]time.Time, len(t.draining))
	services := make([]ravel.VirtualService, 0, len(want))
	for _, s := range want {
		if _, lingers := t.lingering[s.Key.VIP]; lingers {
			continue
		}
		takes := s.TakesNewFlows()
		s.RealServers = t.bendServers(s, now, rising, draining)
		if _, programmed := t.services[s.Key]; !programmed && takes && !s.TakesNewFlows() {
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
	t.rising, t.draining = rising, draining
	return services
}

// bendServers returns the real servers of one service as they should be now, and notes which of them wait.
func (t *timeline) bendServers(s ravel.VirtualService, now time.Time, rising, draining map[serverRef]time.Time) []ravel.RealServer {
	last := t.services[s.Key].RealServers
	if slices.Equal(last, s.RealServers) {
		return s.RealServers
	}
	before := make(map[netip.Addr]ravel.RealServer, len(last))
	for _, rs := range last {
		before[rs.Addr] = rs
	}
	servers := make([]ravel.RealServer, 0, len(s.RealServers))
	waiting := map[serverRef]time.Time{}
	wanted := make(map[netip.Addr]bool, len(s.RealServers))
	for _, rs := range s.RealServers {
		wanted[rs.Addr] = true
		was, programmed := before[rs.Addr]
		if rs.Weight == 0 && was.LastWeight > 0 {
			// While it drains its slots stay as they are, however many of its pods are left.
			rs.LastWeight = was.LastWeight
		}
		if rs.Weight > 0 && was.Weight == 0 && t.timing.Rise > 0 {
			ref := serverRef{s.Key, rs.Addr}
			from, waits := t.rising[ref]
			if !waits {
				from = now.Add(t.timing.Rise)
			}
			if now.Before(from) {
				waiting[ref] = from
				if programmed {
					servers = append(servers, was)
				}
				continue
			}
		}
		servers = append(servers, rs)
	}
	maps.Copy(rising, waiting)
	if len(waiting) > 0 && !(ravel.VirtualService{RealServers: servers}).TakesNewFlows() {
		// Those that are to take over still wait: nobody's weight falls before theirs rise.
		return last
	}
	for _, rs := range last {
		if wanted[rs.Addr] {
			continue
		}
		ref := serverRef{s.Key, rs.Addr}
		until, drains := t.draining[ref]
		if !drains {
			until = now.Add(t.timing.Drain)
		}
		if !now.Before(until) {
			continue
		}
		draining[ref] = until
		rs.Weight = 0
		servers = append(servers, rs)
	}
	slices.SortFunc(servers, func(a, b ravel.RealServer) int { return a.Addr.Compare(b.Addr) })
	return servers
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
	sooner := func(at time.Time) {
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	for _, l := range t.lingering {
		sooner(l.until)
	}
	for _, at := range t.draining {
		sooner(at)
	}
	for _, at := range t.rising {
		sooner(at)
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
