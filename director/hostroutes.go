package director

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

// A host route leads to one real server through itself, as in "ip route add 10.0.0.5 via 10.0.0.5 dev eth0 onlink".
// The packets go where they went without it. It is there for IPVS, which keeps one route for a real server of a service
// and sends all its flows by it (ip_vs_xmit.c, __ip_vs_get_out_rt): those by tunnel and those that go directly, which are
// open side by side after the forwarding changed. A direct packet carries the VIP as its destination, so its route must
// name the next hop. A route that was looked up for a direct packet does (FLOWI_FLAG_KNOWN_NH); one that was looked up
// for a tunnel has no next hop if the real server is on-link, and a direct packet that finds it asks the link for the
// VIP's own neighbour, and is lost. With a host route each lookup has the next hop, whichever packet comes first.
//
// A real server gets one just before its forwarding changes, if it is on-link, and keeps it as long as any service has
// it. Host routes are known by ravel.RouteProtocol, so a new process finds them.

// errTaken says that a host route of ours would not be the one that is followed.
var errTaken = errors.New("another route to it is preferred")

// keepsWay makes sure that flows to a real server stay whole when its forwarding changes, by a host route.
func (r *reach) keepsWay(a netip.Addr) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hosts[a] {
		return nil
	}
	if err := r.routes.addHost(a); err != nil {
		return fmt.Errorf("adding a host route: %w", err)
	}
	r.hosts[a] = true
	r.log.Info("host route added", "realServer", a)
	return nil
}

// renew makes each host route as it should be by the routes of others: they may have moved to another link, or behind a
// gateway, and a link that was down takes host routes with it. The caller holds mu.
func (r *reach) renew() error {
	if len(r.hosts) == 0 {
		return nil
	}
	var errs []error
	for a := range r.hosts {
		switch onLink, err := r.routes.onLink(a); {
		case err != nil: // nowhere, for the time being
		case onLink:
			errs = append(errs, r.routes.addHost(a))
		default:
			errs = append(errs, r.dropHost(a))
		}
	}
	return join(errs)
}

// dropHost removes a host route of ours. The caller holds mu.
func (r *reach) dropHost(a netip.Addr) error {
	if err := r.routes.delHost(a); err != nil {
		return fmt.Errorf("removing the host route to %s: %w", a, err)
	}
	delete(r.hosts, a)
	r.log.Info("host route removed", "realServer", a)
	return nil
}

// resync has the next release read host routes from the kernel and renew them.
func (r *reach) resync() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stale = true
}

// release removes the host routes to addresses that are no real server any more.
func (r *reach) release(services []ravel.VirtualService) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	if r.stale {
		list, err := r.routes.hosts()
		if err != nil {
			return err
		}
		for _, a := range list {
			r.hosts[a] = true
		}
		r.stale = false
		errs = append(errs, r.renew())
	}
	if len(r.hosts) == 0 {
		return join(errs)
	}
	wanted := map[netip.Addr]bool{}
	for _, v := range services {
		for _, rs := range v.RealServers {
			wanted[rs.Addr] = true
		}
	}
	for a := range r.hosts {
		if !wanted[a] {
			errs = append(errs, r.dropHost(a))
		}
	}
	return join(errs)
}

// cleanup removes every host route of ours and returns a line of ip for each. With dryRun it only says what it would do.
func (r *reach) cleanup(ctx context.Context, dryRun bool) (lines []string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	list, err := r.routes.hosts()
	if err != nil {
		return nil, err
	}
	slices.SortFunc(list, netip.Addr.Compare)
	var errs []error
	for _, a := range list {
		if err := ctx.Err(); err != nil {
			return lines, errors.Join(append(errs, err)...)
		}
		if !dryRun {
			if err := r.dropHost(a); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		lines = append(lines, fmt.Sprintf("ip route delete %s via %s proto %d", a, a, ravel.RouteProtocol))
	}
	return lines, errors.Join(errs...)
}

// onLink reports whether packets to an address leave without a gateway, host routes of ours aside.
func (h kernelRoutes) onLink(a netip.Addr) (bool, error) {
	route, err := h.way(a)
	if err != nil {
		return false, err
	}
	return len(route.Gw) == 0 && route.Via == nil && len(route.MultiPath) == 0, nil
}

// way returns the route to an address by the routes of others. The error is errNoRoute where there is none.
func (h kernelRoutes) way(a netip.Addr) (netlink.Route, error) {
	route, err := h.get(a)
	if err == nil && route.Gw.Equal(a.AsSlice()) {
		route, err = h.around(a)
	}
	if err != nil {
		return netlink.Route{}, err
	}
	switch route.Type {
	case unix.RTN_UNICAST, unix.RTN_LOCAL:
		return route, nil
	}
	return netlink.Route{}, errNoRoute
}

// get asks the kernel how it would send.
func (h kernelRoutes) get(a netip.Addr) (netlink.Route, error) {
	list, err := h.RouteGet(a.AsSlice())
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL):
		// The last two are answers of prohibit and blackhole routes.
		return netlink.Route{}, fmt.Errorf("%w: %w", errNoRoute, err)
	case err != nil:
		return netlink.Route{}, fmt.Errorf("asking for the route to %s: %w", a, err)
	case len(list) == 0:
		return netlink.Route{}, errNoRoute
	}
	return list[0], nil
}

// around returns the route of the main table that would be taken without the host route of ours.
func (h kernelRoutes) around(a netip.Addr) (netlink.Route, error) {
	all, err := h.list(a, netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return netlink.Route{}, err
	}
	best, length := netlink.Route{}, -1
	for _, route := range all {
		ones := 0
		if route.Dst != nil {
			if !route.Dst.Contains(a.AsSlice()) {
				continue
			}
			ones, _ = route.Dst.Mask.Size()
		}
		if route.Protocol == ravel.RouteProtocol || route.Flags&(unix.RTNH_F_DEAD|unix.RTNH_F_LINKDOWN) != 0 {
			continue
		}
		if ones > length || ones == length && route.Priority < best.Priority {
			best, length = route, ones
		}
	}
	if length < 0 {
		return netlink.Route{}, errNoRoute
	}
	return best, nil
}

// list dumps routes of an address's family, again while the kernel changes them under the reader, within reason.
func (h kernelRoutes) list(a netip.Addr, filter netlink.Route, mask uint64) (list []netlink.Route, err error) {
	family := netlink.FAMILY_V4
	switch {
	case !a.IsValid():
		family = netlink.FAMILY_ALL
	case a.Is6():
		family = netlink.FAMILY_V6
	}
	for range 5 {
		if list, err = h.RouteListFiltered(family, &filter, mask); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading routes: %w", err)
	}
	return list, nil
}

// ours returns our host routes, all or those to one address.
func (h kernelRoutes) ours(of netip.Addr) (map[netip.Addr]netlink.Route, error) {
	list, err := h.list(of, netlink.Route{Table: unix.RT_TABLE_MAIN, Protocol: ravel.RouteProtocol, Type: unix.RTN_UNICAST},
		netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TYPE)
	if err != nil {
		return nil, err
	}
	found := map[netip.Addr]netlink.Route{}
	for _, route := range list {
		if route.Dst == nil {
			continue
		}
		a, ok := netip.AddrFromSlice(route.Dst.IP)
		a = a.Unmap()
		if ones, bits := route.Dst.Mask.Size(); ok && ones == bits && route.Gw.Equal(route.Dst.IP) && (!of.IsValid() || a == of) {
			found[a] = route
		}
	}
	return found, nil
}

// hosts returns the addresses that have a host route of ours.
func (h kernelRoutes) hosts() ([]netip.Addr, error) {
	found, err := h.ours(netip.Addr{})
	if err != nil {
		return nil, err
	}
	var list []netip.Addr
	for a := range found {
		list = append(list, a)
	}
	return list, nil
}

// addHost adds the host route to an address, or makes it as it should be by the routes of others.
func (h kernelRoutes) addHost(a netip.Addr) error {
	way, err := h.way(a)
	if err != nil {
		return err
	}
	if way.Type != unix.RTN_UNICAST {
		return errTaken // our own address
	}
	want := &netlink.Route{
		Dst: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Gw: a.AsSlice(),
		LinkIndex: way.LinkIndex, Flags: int(netlink.FLAG_ONLINK), Protocol: ravel.RouteProtocol, Table: unix.RT_TABLE_MAIN,
	}
	if a.Is4() {
		want.Src = way.Src // also that of a tunnel's packets
	} else {
		want.Priority = 1 // ahead of those that people make
	}
	found, err := h.ours(a)
	if err != nil {
		return err
	}
	if have, there := found[a]; there {
		if have.LinkIndex == want.LinkIndex && (want.Src == nil || have.Src.Equal(want.Src)) {
			return nil
		}
		if err := h.delHost(a); err != nil {
			return err
		}
	}
	switch err := h.RouteAdd(want); {
	case errors.Is(err, unix.EEXIST):
		return errTaken
	case err != nil:
		return err
	}
	if now, err := h.get(a); err != nil || !now.Gw.Equal(a.AsSlice()) {
		return errors.Join(errTaken, err, h.delHost(a))
	}
	return nil
}

// delHost removes the host route of ours to an address, if there is one.
func (h kernelRoutes) delHost(a netip.Addr) error {
	err := h.RouteDel(&netlink.Route{
		Dst: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Gw: a.AsSlice(),
		Protocol: ravel.RouteProtocol, Table: unix.RT_TABLE_MAIN,
	})
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
