package realserver

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// kernelNetwork is the kernel of this thread's network namespace.
type kernelNetwork struct{}

var _ network = kernelNetwork{}

func (kernelNetwork) route(to netip.Addr) (route, error) {
	routes, err := netlink.RouteGet(net.IP(to.AsSlice()))
	if err != nil {
		return route{}, fmt.Errorf("looking up the route to %s: %w", to, err)
	}
	if len(routes) == 0 {
		return route{}, fmt.Errorf("looking up the route to %s: there is none", to)
	}
	r := routes[0]
	link, err := netlink.LinkByIndex(r.LinkIndex)
	if err != nil {
		return route{}, fmt.Errorf("looking up the link to %s: %w", to, err)
	}
	way := route{link: link.Attrs().Name, mtu: link.Attrs().MTU, local: r.Type == unix.RTN_LOCAL}
	if r.MTU > 0 && r.MTU < way.mtu {
		way.mtu = r.MTU
	}
	// A host route leads to the address through itself.
	way.onLink = (len(r.Gw) == 0 || r.Gw.Equal(to.AsSlice())) && r.Via == nil
	return way, nil
}

func (kernelNetwork) prepareTunnel(device string, v6 bool) error {
	link, err := netlink.LinkByName(device)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		// The kernel loads the module for a link of this kind, and the module may make the device itself.
		attrs := netlink.NewLinkAttrs()
		attrs.Name = device
		var l netlink.Link = &netlink.Iptun{LinkAttrs: attrs}
		if v6 {
			l = &netlink.Ip6tnl{LinkAttrs: attrs, Local: net.IPv6zero, Remote: net.IPv6zero, Proto: unix.IPPROTO_IPV6}
		}
		if err := netlink.LinkAdd(l); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("adding link %s: %w", device, err)
		}
		link, err = netlink.LinkByName(device)
	}
	if err != nil {
		return fmt.Errorf("looking up link %s: %w", device, err)
	}
	kind := "ipip"
	if v6 {
		kind = "ip6tnl"
	}
	if link.Type() != kind {
		return fmt.Errorf("link %s is of type %s, want %s", device, link.Type(), kind)
	}
	if v6 {
		return nil
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("listing addresses of %s: %w", device, err)
	}
	if len(addrs) > 0 {
		return nil
	}
	// Of host scope, so that no packet is ever sent from it.
	addr := &netlink.Addr{IPNet: ipNet(tunnelAddr), Scope: unix.RT_SCOPE_HOST}
	if err := netlink.AddrAdd(link, addr); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding %s to %s: %w", tunnelAddr, device, err)
	}
	return nil
}

func (kernelNetwork) tunnelShared(device string) (bool, error) {
	link, err := netlink.LinkByName(device)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("looking up link %s: %w", device, err)
	}
	switch up := link.Attrs().Flags&net.FlagUp != 0; link.Attrs().Alias {
	case tunnelAlias:
	case "":
		if up {
			return true, nil
		}
	default:
		return true, nil
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return false, fmt.Errorf("listing addresses of %s: %w", device, err)
	}
	return slices.ContainsFunc(addrs, foreignAddr), nil
}

// foreignAddr reports whether an address of a tunnel device is neither ours nor the kernel's.
func foreignAddr(a netlink.Addr) bool { return !ourAddr(a) && !a.IP.IsLinkLocalUnicast() }

func ourAddr(a netlink.Addr) bool { return a.IPNet.String() == tunnelAddr.String() }

func (kernelNetwork) startTunnel(device string) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("looking up link %s: %w", device, err)
	}
	if link.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	if link.Attrs().Alias == "" {
		if err := netlink.LinkSetAlias(link, tunnelAlias); err != nil {
			return fmt.Errorf("setting the alias of %s: %w", device, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s up: %w", device, err)
	}
	return nil
}

func (kernelNetwork) stopTunnel(device string, dryRun bool) ([]string, error) {
	link, err := netlink.LinkByName(device)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking up link %s: %w", device, err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("listing addresses of %s: %w", device, err)
	}
	foreign := slices.ContainsFunc(addrs, foreignAddr)
	var done []string
	if link.Attrs().Alias == tunnelAlias {
		if !foreign {
			done = append(done, "ip link set "+device+" down")
		}
		done = append(done, "ip link set "+device+` alias ""`)
		if !dryRun {
			if !foreign {
				if err := netlink.LinkSetDown(link); err != nil {
					return nil, fmt.Errorf("setting %s down: %w", device, err)
				}
			}
			if err := netlink.LinkSetAlias(link, ""); err != nil {
				return done, fmt.Errorf("clearing the alias of %s: %w", device, err)
			}
		}
	}
	for _, a := range addrs {
		if !ourAddr(a) {
			continue
		}
		done = append(done, "ip address del "+tunnelAddr.String()+" dev "+device)
		if !dryRun {
			if err := netlink.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return done, fmt.Errorf("removing %s from %s: %w", tunnelAddr, device, err)
			}
		}
	}
	return done, nil
}

// flowFilter matches UDP flows.
type flowFilter func(key ravel.ServiceKey, server netip.AddrPort) bool

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (match flowFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	if flow.Forward.Protocol != unix.IPPROTO_UDP {
		return false
	}
	vip, ok := netip.AddrFromSlice(flow.Forward.DstIP)
	server, ok2 := netip.AddrFromSlice(flow.Reverse.SrcIP)
	if !ok || !ok2 {
		return false
	}
	return match(ravel.ServiceKey{VIP: vip.Unmap(), Proto: ravel.UDP, Port: flow.Forward.DstPort},
		netip.AddrPortFrom(server.Unmap(), flow.Reverse.SrcPort))
}

func (kernelNetwork) deleteFlows(v6 bool, match func(key ravel.ServiceKey, server netip.AddrPort) bool) (int, error) {
	family := netlink.InetFamily(unix.AF_INET)
	if v6 {
		family = unix.AF_INET6
	}
	n, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, flowFilter(match))
	return int(n), err
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
