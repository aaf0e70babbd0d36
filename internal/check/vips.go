package check

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
)

// alias is how Ravel marks a link as its own.
const alias = "ravel"

// ourLink returns the link that holds VIPs, if it is there and ours.
func (f *facts) ourLink(links []link) (link, bool) {
	i := slices.IndexFunc(links, func(l link) bool { return l.name == f.Link })
	if i < 0 {
		return link{}, false
	}
	return links[i], links[i].kind == "dummy" && links[i].alias == alias
}

func checkLink(f *facts) []Line {
	links, err := f.links()
	if err != nil {
		return []Line{warn("ip -d link", "%v", err)}
	}
	l, ours := f.ourLink(links)
	switch {
	case l.name == "":
		return []Line{f.have("dummy", "DUMMY").line("dummy, to make "+f.Link+" with", "dummy", true)}
	case ours:
		return []Line{ok("%s is Ravel's", f.Link)}
	case l.kind == "dummy" && l.alias == "" && !l.up:
		return []Line{ok("%s is a bare dummy; Ravel takes it over", f.Link)}
	}
	return []Line{fail("ip link delete "+word(f.Link)+", or set another name for Ravel's",
		"%s is a %s with the alias %q, which Ravel did not make", f.Link, l.kind, l.alias)}
}

// checkVIPAddress looks for VIPs on links that are not ours, and for VIPs that are hosts' own addresses.
func checkVIPAddress(f *facts) []Line {
	if len(f.VIPs) == 0 {
		return nil
	}
	links, err := f.links()
	if err != nil {
		return []Line{warn("ip -d link", "%v", err)}
	}
	addrs, err := f.addrs()
	if err != nil {
		return []Line{warn("ip addr", "%v", err)}
	}
	our, ours := f.ourLink(links)
	var lines []Line
	for _, vip := range f.VIPs {
		if i := slices.IndexFunc(addrs, func(a addr) bool {
			return a.prefix.Addr() == vip && !(ours && a.index == our.index)
		}); i >= 0 {
			a := addrs[i]
			fix := fmt.Sprintf("ip addr del %s dev %s", a.prefix, word(a.link))
			if a.prefix.Bits() < vip.BitLen() || slices.Contains(f.Nodes, vip) || slices.Contains(f.Directors, vip) {
				// Most likely what the host is reached by.
				fix = "choose another VIP, or if the host is not reached by it: " + fix
			}
			harm := "this host answers ARP or solicitations for it there"
			if quiet(links, a.index) {
				harm = "this host keeps it when Ravel lets it go"
			}
			lines = append(lines, fail(fix, "VIP %s is on %s too: %s", vip, a.link, harm))
			continue
		}
		for _, other := range []struct {
			what string
			is   bool
		}{
			{"node", slices.Contains(f.Nodes, vip)},
			{"director", slices.Contains(f.Directors, vip)},
			{"peer", f.isPeer(vip)},
		} {
			if other.is {
				lines = append(lines, fail("choose another VIP", "VIP %s is the address of a %s", vip, other.what))
				break
			}
		}
	}
	if len(lines) == 0 {
		return []Line{ok("%s: on no other link", some(f.VIPs))}
	}
	return lines
}

// checkVIPSubnet looks for VIPs inside of a subnet that this host is in: its neighbours look for them by ARP, which
// nobody answers, not by a route.
func checkVIPSubnet(f *facts) []Line {
	if len(f.VIPs) == 0 {
		return nil
	}
	links, err := f.links()
	if err != nil {
		return []Line{warn("ip -d link", "%v", err)}
	}
	addrs, err := f.addrs()
	if err != nil {
		return []Line{warn("ip addr", "%v", err)}
	}
	var lines []Line
	for _, vip := range f.VIPs {
		i := slices.IndexFunc(addrs, func(a addr) bool {
			return a.prefix.Contains(vip) && a.prefix.Bits() < vip.BitLen() && !quiet(links, a.index)
		})
		if i < 0 {
			continue
		}
		subnet := addrs[i].prefix.Masked()
		lines = append(lines, warn(fmt.Sprintf("choose VIPs outside of %s", subnet),
			"VIP %s lies in the subnet %s of %s: hosts there ask for it by ARP or solicitations, which nobody answers, and take no route",
			vip, subnet, addrs[i].link))
	}
	if len(lines) == 0 {
		return []Line{ok("no VIP lies in a subnet of this host")}
	}
	return lines
}

// checkVIPRoute looks for routes to exactly a VIP that others made.
func checkVIPRoute(f *facts) []Line {
	if len(f.VIPs) == 0 {
		return nil
	}
	var lines []Line
	for _, vip := range f.VIPs {
		e, err := f.kernel.entry(vip)
		if err != nil && !errors.Is(err, errNoRoute) {
			lines = append(lines, warn("ip route get "+vip.String(), "VIP %s: %v", vip, err))
			continue
		}
		if err != nil || e.local || !e.unicast || e.prefix.Addr() != vip || e.prefix.Bits() != vip.BitLen() {
			continue // no route at all, or the VIP is held here: that is another line
		}
		way := "by " + e.link
		fix := fmt.Sprintf("ip route del %s dev %s", e.prefix, word(e.link))
		if e.gateway.IsValid() {
			way = fmt.Sprintf("by %s through %s", e.gateway, e.link)
			fix = fmt.Sprintf("ip route del %s via %s", e.prefix, e.gateway)
		}
		if e.protocol == protocolBGP {
			// Another director's announcement, taken in by a routing daemon of this host.
			lines = append(lines, ok("VIP %s: a routing daemon has a route to it, %s", vip, way))
			continue
		}
		lines = append(lines, warn(fix, "VIP %s: this host has a route to it, %s", vip, way))
	}
	if len(lines) == 0 {
		return []Line{ok("no other route leads to a VIP")}
	}
	return lines
}

// protocolBGP is RTPROT_BGP of linux/rtnetlink.h.
const protocolBGP = 186

// checkVIPServices looks for services of IPVS that others made for a VIP.
func checkVIPServices(f *facts) []Line {
	if !f.ipvsThere() {
		return nil
	}
	services, err := f.kernel.services()
	if err != nil {
		return []Line{warn("ipvsadm -Ln", "%v", err)}
	}
	var lines []Line
	ours, foreign, marks := 0, 0, 0
	for _, s := range services {
		switch {
		case s.mark != 0:
			marks++
		case s.ours:
			ours++
		case slices.Contains(f.VIPs, s.key.VIP):
			flag := map[string]string{"tcp": "-t", "udp": "-u"}[s.key.Proto.String()]
			if flag == "" {
				flag = "--sctp-service"
			}
			at := fmt.Sprintf("%s:%d", s.key.VIP, s.key.Port)
			if s.key.VIP.Is6() {
				at = fmt.Sprintf("[%s]:%d", s.key.VIP, s.key.Port)
			}
			fix := "ipvsadm -D " + flag + " " + at
			if f.director() {
				lines = append(lines, fail(fix, "%s is a service of IPVS that Ravel did not make: it is left alone, and Ravel does not serve it here", s.key))
			} else {
				lines = append(lines, warn(fix, "%s is a service of IPVS on a realserver: packets that no redirect takes go to it", s.key))
			}
		default:
			foreign++
		}
		if s.ours && f.realserver() && !f.director() && slices.Contains(f.VIPs, s.key.VIP) {
			lines = append(lines, warn("ravel cleanup, or run the two roles on different hosts",
				"%s is a service of a director of Ravel's on a realserver: the redirect takes its packets", s.key))
		}
	}
	if marks > 0 && f.director() {
		lines = append(lines, warn("ipvsadm -Ln; ipvsadm -D -f MARK", "%d services are by firewall mark: they come before all others for packets that carry the mark", marks))
	}
	if len(lines) == 0 {
		return []Line{ok("%d of Ravel's, %d of others for other addresses", ours, foreign)}
	}
	return lines
}

// quiet reports whether no neighbour can ask by a link.
func quiet(links []link, index int) bool {
	return slices.ContainsFunc(links, func(l link) bool { return l.index == index && (l.kind == "dummy" || l.name == "lo") })
}

func (f *facts) isPeer(a netip.Addr) bool {
	return slices.ContainsFunc(f.Peers, func(p ravel.Peer) bool { return p.Addr.Unmap() == a })
}
