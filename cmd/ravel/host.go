package main

import (
	"net/netip"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/gossip"
	"github.com/ravel-lb/ravel/internal/check"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/settings"
)

// checkFlags are the settings that a check looks at.
func checkFlags() []cli.Flag {
	return settings.Flags(append([]cli.Flag{
		configFlag(), staticFlag(), socketFlag(), stateDirFlag(), nodeFlag(),
		stringFlag("listen", "", "with --host: the TCP address for metrics that a role is to have"),
		intFlag("bgp-port", 0, "with --host: the port on which a director is to take BGP sessions"),
		stringFlag("gossip-listen", defaultGossipListen, "with --host: where gossip is to listen"),
		stringFlag("health-listen", defaultHealthListen, "with --host: where a realserver is to answer probes"),
		boolFlag("count-packets", false, "with --fix: what a director is to be told"),
	}, append(defaultServiceFlags(), hostFlags()...)...)...)
}

// hostCheck is the preflight of this host for what the document has here.
func hostCheck(c *cli.Context, role, name string, host values, listen []netip.AddrPort, document config.Static) check.Host {
	h := check.Host{
		Role: role, Socket: c.String("admin-socket"), Link: host.link, IPTables: host.variant, Listen: listen,
		Tunnel: len(document.Cluster.Services) > 0 && document.Fleet.Forwarding != ravel.Direct,
	}
	for _, s := range document.Cluster.Services {
		h.VIPs = append(h.VIPs, s.Key.VIP)
		h.Tunnel = h.Tunnel || s.Forwarding != nil && *s.Forwarding != ravel.Direct
	}
	slices.SortFunc(h.VIPs, netip.Addr.Compare)
	h.VIPs = slices.Compact(h.VIPs)
	for _, n := range document.Cluster.Nodes {
		h.Nodes = append(h.Nodes, n.Addrs...)
	}
	for _, d := range document.Fleet.Directors {
		h.Directors = append(h.Directors, d.Addrs...)
	}
	state, _ := desired.Compute(desired.Inputs{Role: ravel.Director, Node: name, Cluster: document.Cluster, Fleet: document.Fleet})
	h.Peers = state.Peers
	return h
}

// listenAddrs are the TCP addresses that a role is to listen on.
func (f *faults) listenAddrs(c *cli.Context) []netip.AddrPort {
	var addrs []netip.AddrPort
	if a := f.listenAddr(c.String("listen")); a.Port() != 0 {
		addrs = append(addrs, a)
	}
	addrs = append(addrs, f.addrPort(c, "gossip-listen", gossip.DefaultPort))
	if at := f.addrPort(c, "health-listen", defaultHealthPort); at.IsValid() && c.String("role") != ravel.Director.String() {
		addrs = append(addrs, at)
	}
	switch port := c.Int("bgp-port"); {
	case port < 0 || port > 65535:
		f.add("bgp-port", "%d: want 0 to 65535", port)
	case port > 0:
		addrs = append(addrs, netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(port)))
	}
	return addrs
}
