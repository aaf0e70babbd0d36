package check

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel"
)

// checkTunnel looks for what a realserver takes tunnelled packets with.
func checkTunnel(f *facts) []Line {
	links, err := f.links()
	if err != nil {
		return []Line{warn("ip -d link", "%v", err)}
	}
	v4, v6 := split(f.VIPs)
	var lines []Line
	var fine []string
	for _, family := range []struct {
		name, device, kind, module, symbol string
		vips                               int
	}{
		{"IPv4", "tunl0", "ipip", "ipip", "NET_IPIP", len(v4)},
		{"IPv6", "ip6tnl0", "ip6tnl", "ip6_tunnel", "IPV6_TUNNEL", len(v6)},
	} {
		if family.vips == 0 && len(f.VIPs) > 0 {
			continue
		}
		i := slices.IndexFunc(links, func(l link) bool { return l.name == family.device })
		switch {
		case i >= 0 && links[i].kind != family.kind:
			lines = append(lines, fail("ip link delete "+family.device, "%s is a %s, not the kernel's own %s device", family.device, links[i].kind, family.kind))
		case i >= 0 && links[i].up:
			fine = append(fine, family.device+" is up")
		case i >= 0:
			fine = append(fine, family.device+" is there")
		default:
			l := f.have(family.module, family.symbol).line(family.module, family.module, f.Tunnel)
			if l.Status != OK {
				lines = append(lines, l)
			} else {
				fine = append(fine, family.device+" can be made")
			}
		}
	}
	if len(lines) > 0 {
		return lines
	}
	return []Line{ok("%s", strings.Join(fine, ", "))}
}

// checkTunnelOthers looks for devices that take directors' packets before the kernel's own device does: one that takes
// every packet which no other claims, or one for exactly such packets.
func checkTunnelOthers(f *facts) []Line {
	links, err := f.links()
	if err != nil {
		return []Line{warn("ip -d link", "%v", err)}
	}
	bad := warn
	if f.Tunnel {
		bad = fail
	}
	var lines []Line
	for _, l := range links {
		if l.kind != "ipip" && l.kind != "ip6tnl" || l.name == "tunl0" || l.name == "ip6tnl0" {
			continue
		}
		fix := "ip link delete " + word(l.name)
		switch {
		case l.external:
			lines = append(lines, bad(fix, "%s is an external %s device: it takes every tunnelled packet that no exact tunnel claims, before the kernel's own does", l.name, l.kind))
		case slices.Contains(f.Directors, l.remote):
			lines = append(lines, bad(fix, "%s is a tunnel to director %s: it takes that director's packets", l.name, l.remote))
		case !l.remote.IsValid() && l.local.IsValid() && l.up:
			lines = append(lines, bad(fix, "%s takes tunnelled packets from anywhere to %s", l.name, l.local))
		}
	}
	if len(lines) == 0 {
		return []Line{ok("no other device takes directors' packets")}
	}
	return lines
}

// overhead is what a tunnel adds to each packet: the outer header. IPv6's kernel device may add the 8 bytes of the
// encapsulation limit (RFC 2473 section 5.1), IPVS adds none.
func overhead(a netip.Addr) int {
	if a.Is4() {
		return 20
	}
	return 40
}

// minMTU is the shortest packet that each family must carry whole (RFC 8200 section 5; for IPv4 what hosts use).
func minMTU(a netip.Addr) int {
	if a.Is4() {
		return 576
	}
	return 1280
}

func checkMTU(f *facts) []Line {
	if !f.Tunnel {
		return nil
	}
	type way struct {
		link string
		mtu  int
		v6   bool
	}
	ways := map[way]netip.Addr{}
	for _, a := range f.others() {
		if r, err := f.kernel.route(a); err == nil && !r.local && r.mtu > 0 {
			if w := (way{r.link, r.mtu, a.Is6()}); !ways[w].IsValid() {
				ways[w] = a
			}
		}
	}
	var lines []Line
	var fine []string
	for w, a := range ways {
		room := w.mtu - overhead(a)
		fix := fmt.Sprintf("ip link set %s mtu %d, and the same on all that lies between", word(w.link), 1500+overhead(a))
		switch {
		case room < minMTU(a):
			lines = append(lines, fail(fix, "the way to %s (%s) carries %d bytes: a tunnel leaves %d of them, fewer than every packet needs", a, w.link, w.mtu, room))
		case w.mtu < 1500:
			lines = append(lines, warn(fix, "the way to %s (%s) carries %d bytes: a tunnel leaves %d of them; TCP is clamped to that, UDP is not", a, w.link, w.mtu, room))
		default:
			fine = append(fine, fmt.Sprintf("%s leaves %d bytes in a tunnel", w.link, room))
		}
	}
	slices.SortFunc(lines, func(a, b Line) int { return strings.Compare(a.Detail, b.Detail) })
	slices.Sort(fine)
	switch {
	case len(lines) > 0:
		return lines
	case len(fine) > 0:
		return []Line{ok("%s; TCP is clamped to fit", some(slices.Compact(fine)))}
	}
	return nil
}

// others are the hosts at the other end of a tunnel.
func (f *facts) others() []netip.Addr {
	var all []netip.Addr
	if f.director() {
		all = append(all, f.Nodes...)
	}
	if f.realserver() {
		all = append(all, f.Directors...)
	}
	return all
}

func checkNodes(f *facts) []Line { return f.reach(f.Nodes, "node") }

func checkDirectors(f *facts) []Line { return f.reach(f.Directors, "director") }

// reach says how each address is reached.
func (f *facts) reach(list []netip.Addr, what string) []Line {
	var lines []Line
	var behind []string
	onLink := 0
	for _, a := range list {
		r, err := f.kernel.route(a)
		switch {
		case err != nil:
			lines = append(lines, fail("ip route get "+a.String()+"; ip route add "+a.String()+" via GATEWAY", "%s %s cannot be reached: %v", what, a, err))
		case r.local:
			if what == "node" && f.director() && !f.both() {
				lines = append(lines, warn("run the two roles on different hosts, or in different network namespaces",
					"node %s is this host: IPVS and the redirects of a realserver do not work in one network namespace", a))
			}
		case r.gateway.IsValid():
			behind = append(behind, fmt.Sprintf("%s by %s", a, r.gateway))
		default:
			onLink++
		}
	}
	if len(lines) > 0 || len(list) == 0 {
		return lines
	}
	if len(behind) == 0 {
		return []Line{ok("%d on-link", onLink)}
	}
	return []Line{ok("%d on-link, %d behind a router (%s): these need forwarding by tunnel", onLink, len(behind), some(behind))}
}

func (f *facts) both() bool { return f.director() && f.realserver() }

func checkPeers(f *facts) []Line {
	var lines []Line
	for _, p := range f.Peers {
		lines = append(lines, f.peer(p)...)
	}
	if len(lines) > 0 || len(f.Peers) == 0 {
		return lines
	}
	return []Line{ok("%d can be reached", len(f.Peers))}
}

func (f *facts) peer(p ravel.Peer) (lines []Line) {
	if p.PasswordFile != "" {
		if err := readable(f.given(p.PasswordFile)); err != nil {
			lines = append(lines, fail("install -m 600 KEYFILE "+word(p.PasswordFile), "peer %s: its password cannot be read: %v", p.Addr, err))
		}
	}
	if !p.Addr.IsValid() {
		return lines
	}
	r, err := f.kernel.route(p.Addr)
	switch {
	case err != nil:
		return append(lines, fail("ip route get "+p.Addr.String()+"; ip route add "+p.Addr.String()+" via GATEWAY", "peer %s cannot be reached: %v", p.Addr, err))
	case r.local:
		return append(lines, warn("set the router's address", "peer %s is this host itself", p.Addr))
	case r.gateway.IsValid() && p.ASN != p.LocalASN && p.Multihop == 0:
		return append(lines, fail("set multihop: 2 for the peer, or more if there are more routers between",
			"peer %s is behind %s, and an eBGP session reaches on-link routers only", p.Addr, r.gateway))
	}
	if !p.LocalAddr.IsValid() {
		return lines
	}
	addrs, err := f.addrs()
	if err == nil && !slices.ContainsFunc(addrs, func(a addr) bool { return a.prefix.Addr() == p.LocalAddr.Unmap() }) {
		lines = append(lines, fail("ip addr add "+p.LocalAddr.String()+" dev "+word(r.link), "peer %s: the session is to start from %s, which this host does not have", p.Addr, p.LocalAddr))
	}
	return lines
}

// readable returns why a file cannot be read.
func readable(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	return file.Close()
}
