package director

import (
	"context"
	"errors"
	"fmt"
	"maps"
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
// it, until the next resync. Host routes are known by ravel.RouteProtocol, so a new process finds them.

// errTaken says that a host route of ours would not do.
var errTaken = errors.New("another route to it stands in the way")

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
// gateway, and a link that was down took its host routes with it. The caller holds mu.
func (r *reach) renew() {
	if len(r.hosts) == 0 {
		return
	}
	taken, err := r.routes.setHosts(slices.Collect(maps.Keys(r.hosts)))
	for _, a := range taken {
		delete(r.hosts, a)
	}
	if err != nil {
		r.log.Error("host routes are not as they should be", "err", err)
	}
}

// resync has the next release look at all host routes.
func (r *reach) resync() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stale = true
}

// release removes, at the start and after resync, the host routes to addresses that are no real server any more, and
// renews the others. What cannot be done is tried again the next time.
func (r *reach) release(services []ravel.VirtualService) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.stale {
		return
	}
	list, err := r.routes.hosts()
	if err != nil {
		r.log.Error("host routes are not known", "err", err)
		return
	}
	r.stale = false
	for _, a := range list {
		r.hosts[a] = true
	}
	if len(r.hosts) == 0 {
		return
	}
	wanted := map[netip.Addr]bool{}
	for _, v := range services {
		for _, rs := range v.RealServers {
			wanted[rs.Addr] = true
		}
	}
	for a := range r.hosts {
		if wanted[a] {
			continue
		}
		if err := r.dropHost(a); err != nil {
			r.log.Error("a host route stays", "realServer", a, "err", err)
		}
	}
	r.renew()
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

// onLink reports whether packets to an address leave without a gateway. They do by a host route, of ours or of others.
func (h kernelRoutes) onLink(a netip.Addr) (bool, error) {
	route, err := h.get(a)
	if err != nil {
		return false, err
	}
	switch route.Type {
	case unix.RTN_UNICAST, unix.RTN_LOCAL:
		return isOnLink(route) || route.Gw.Equal(a.AsSlice()), nil
	}
	return false, errNoRoute
}

func isOnLink(route netlink.Route) bool {
	return len(route.Gw) == 0 && route.Via == nil && len(route.MultiPath) == 0
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

// mainTable is one family's main table, in two parts.
type mainTable struct {
	ours   map[netip.Addr]netlink.Route // host routes
	others []netlink.Route
}

// read dumps one family's main table, again while the kernel changes it under the reader, within reason.
func (h kernelRoutes) read(family int) (*mainTable, error) {
	var all []netlink.Route
	var err error
	for range 5 {
		all, err = h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading routes: %w", err)
	}
	t := &mainTable{ours: map[netip.Addr]netlink.Route{}}
	for _, route := range all {
		if route.Protocol != ravel.RouteProtocol {
			t.others = append(t.others, route)
			continue
		}
		if route.Type != unix.RTN_UNICAST || route.Dst == nil {
			continue
		}
		a, ok := netip.AddrFromSlice(route.Dst.IP)
		if ones, bits := route.Dst.Mask.Size(); ok && ones == bits && route.Gw.Equal(route.Dst.IP) {
			t.ours[a.Unmap()] = route
		}
	}
	return t, nil
}

// around returns the route of others that leads to an address.
func (t *mainTable) around(a netip.Addr) (netlink.Route, bool) {
	best, length := netlink.Route{}, -1
	for _, route := range t.others {
		ones := 0
		if route.Dst != nil {
			if !route.Dst.Contains(a.AsSlice()) {
				continue
			}
			ones, _ = route.Dst.Mask.Size()
		}
		if route.Flags&(unix.RTNH_F_DEAD|unix.RTNH_F_LINKDOWN) == 0 &&
			(ones > length || ones == length && route.Priority < best.Priority) {
			best, length = route, ones
		}
	}
	return best, length >= 0
}

func netlinkFamily(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

// hosts returns the addresses that have a host route of ours.
func (h kernelRoutes) hosts() ([]netip.Addr, error) {
	var list []netip.Addr
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		table, err := h.read(family)
		if err != nil {
			return nil, err
		}
		list = slices.AppendSeq(list, maps.Keys(table.ours))
	}
	return list, nil
}

// addHost adds the host route to an address that is on-link by the main table.
func (h kernelRoutes) addHost(a netip.Addr) error {
	table, err := h.read(netlinkFamily(a))
	if err != nil {
		return err
	}
	return h.set(table, a)
}

// setHosts makes the host routes to these addresses as they should be: whatever is on-link has one, and follows the
// route of others. Nothing else has one, but may be on-link again later. It returns those that can have none beside what
// somebody else made.
func (h kernelRoutes) setHosts(addrs []netip.Addr) (taken []netip.Addr, err error) {
	var errs []error
	tables := map[int]*mainTable{}
	for _, a := range addrs {
		family := netlinkFamily(a)
		if tables[family] == nil {
			table, err := h.read(family)
			if err != nil {
				return taken, err
			}
			tables[family] = table
		}
		table := tables[family]
		var err error
		if way, found := table.around(a); !found || !isOnLink(way) {
			if _, there := table.ours[a]; there {
				err = h.delHost(a)
			}
		} else {
			err = h.set(table, a)
		}
		if errors.Is(err, errTaken) {
			taken = append(taken, a)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", a, err))
		}
	}
	return taken, join(errs)
}

// set sees to one host route.
func (h kernelRoutes) set(table *mainTable, a netip.Addr) error {
	way, found := table.around(a)
	if !found || way.Type != unix.RTN_UNICAST || !isOnLink(way) {
		return errTaken // or it is not the main table that leads there
	}
	want := hostRoute(a)
	want.LinkIndex, want.Flags = way.LinkIndex, int(netlink.FLAG_ONLINK)
	want.MTU, want.MTULock, want.AdvMSS = way.MTU, way.MTULock, way.AdvMSS
	if a.Is4() {
		want.Src = way.Src // also that of a tunnel's packets
	} else {
		want.Priority = 1 // ahead of those that people make
	}
	if have, there := table.ours[a]; there {
		if have.LinkIndex == want.LinkIndex && have.MTU == want.MTU && have.AdvMSS == want.AdvMSS &&
			(want.Src == nil || have.Src.Equal(want.Src)) {
			return nil
		}
		if err := h.delHost(a); err != nil {
			return err
		}
	}
	if now, err := h.get(a); err == nil && now.Type == unix.RTN_LOCAL {
		return errTaken
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

// hostRoute is what makes a host route ours and no other.
func hostRoute(a netip.Addr) *netlink.Route {
	return &netlink.Route{
		Dst: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Gw: a.AsSlice(),
		Protocol: ravel.RouteProtocol, Table: unix.RT_TABLE_MAIN,
	}
}

// delHost removes the host route of ours to an address, if there is one.
func (h kernelRoutes) delHost(a netip.Addr) error {
	err := h.RouteDel(hostRoute(a))
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
