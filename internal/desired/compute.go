// Package desired computes what one process should make true from all that it knows. Read it first: everything left
// of it gathers Inputs, everything right of it makes a ravel.State so.
//
// Compute is pure. It never asks the kernel, the clock or the network, it ignores the order of its inputs, and what
// it leaves out of the state it returns as problems. For two directors whose inputs differ only in Node it gives the
// same Services, so that they program the same Maglev tables.
package desired

import (
	"cmp"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/roster"
)

// Compute turns inputs into the state that the process named by in.Role and in.Node should make true.
func Compute(in Inputs) (ravel.State, []ravel.Problem) {
	c := computation{in: in}
	c.index()
	var state ravel.State
	if in.Role == ravel.Realserver {
		state.Redirects = c.redirects()
		state.Directors = c.directors()
		state.Addrs = addrsOf(state.Redirects, func(r ravel.Redirect) netip.Addr { return r.Key.VIP })
		if in.Agreed != nil {
			state.InUse, state.Unheard = in.Agreed.InUse, in.Agreed.Unheard
		}
	} else {
		state.Services = c.services()
		state.Addrs = addrsOf(state.Services, func(s ravel.VirtualService) netip.Addr { return s.Key.VIP })
		c.announce(&state)
	}
	slices.SortFunc(c.problems, ravel.Problem.Compare)
	return state, slices.Compact(c.problems)
}

// computation is the scratch space of one Compute.
type computation struct {
	in       Inputs
	ordered  []Service                    // of the cluster, by key
	nodes    map[string]*Node             // by name: those that may be real servers
	pods     map[portRef][]*Endpoint      // by what a Service names
	taken    map[netip.Addr]ravel.Problem // addresses that can be no VIP, and why
	owner    map[netip.Addr]string        // the node that has an address; the first by name where several claim it
	problems []ravel.Problem
}

// portRef is how a service of the cluster document names its pods.
type portRef struct{ namespace, service, port string }

// mendable is problem with what to do about it.
func (c *computation) mendable(where, fix, format string, args ...any) {
	c.problems = append(c.problems, ravel.Problem{Where: where, What: fmt.Sprintf(format, args...), Fix: fix})
}

func (c *computation) problem(where, format string, args ...any) {
	c.problems = append(c.problems, ravel.Problem{Where: where, What: fmt.Sprintf(format, args...)})
}

// index sorts the inputs into maps, and leaves out what cannot be served.
func (c *computation) index() {
	c.taken = map[netip.Addr]ravel.Problem{}
	directors, directorAt := map[string]bool{}, map[netip.Addr]string{}
	for _, d := range c.in.Fleet.Directors {
		directors[d.Name] = true
		for _, a := range d.Addrs {
			directorAt[a] = d.Name
			c.taken[a] = ravel.Problem{What: fmt.Sprintf("the address is director %s's own", d.Name)}
		}
	}

	ready := func(node string) bool { // asked of the few that claim one address
		return slices.ContainsFunc(c.in.Cluster.Nodes, func(n Node) bool { return n.Name == node && n.Ready })
	}
	c.nodes = make(map[string]*Node, len(c.in.Cluster.Nodes))
	c.owner = map[netip.Addr]string{}
	for i := range c.in.Cluster.Nodes {
		n := &c.in.Cluster.Nodes[i]
		for _, a := range n.Addrs {
			c.taken[a] = ravel.Problem{What: fmt.Sprintf("the address is node %s's own", n.Name)}
			if other, used := c.owner[a]; used && other != n.Name {
				first, second := min(other, n.Name), max(other, n.Name)
				if r := ready(other); r != n.Ready && (r && second == other || n.Ready && second == n.Name) {
					first, second = second, first // a node that is gone, and came again under another name
				}
				c.problem("nodes."+second, "address %s is node %s's, so its pods get no traffic by it", a, first)
				c.owner[a] = first
				continue
			}
			c.owner[a] = n.Name
		}
		director := ""
		if directors[n.Name] {
			director = n.Name
		}
		for _, a := range n.Addrs {
			director = cmp.Or(director, directorAt[a])
		}
		if director != "" {
			if c.wanted(n) && !c.in.Fleet.HasDirectorLabels(*n) { // else it is meant to be one
				also := ""
				if director != n.Name {
					also = " (" + director + ", by its address)"
				}
				c.problem("nodes."+n.Name, "is a director too%s, so it is no real server: "+
					"in one network namespace the redirect would take every packet before IPVS sees it", also)
			}
			continue
		}
		if c.wanted(n) {
			c.nodes[n.Name] = n
		}
	}

	if nodes := c.in.Cluster.Nodes; len(nodes) > 0 && !slices.ContainsFunc(nodes, func(n Node) bool { return c.wanted(&n) }) {
		c.problem("cluster.labels", "none of the %d nodes has all of these labels, so there is no real server", len(nodes))
	}

	c.pods = make(map[portRef][]*Endpoint, len(c.in.Cluster.Services))
	for i := range c.in.Cluster.Endpoints {
		e := &c.in.Cluster.Endpoints[i]
		ref := portRef{e.Namespace, e.Service, e.PortName}
		c.pods[ref] = append(c.pods[ref], e)
	}

	c.ordered = make([]Service, 0, len(c.in.Cluster.Services))
	for _, s := range c.in.Cluster.Services {
		if p, taken := c.taken[s.Key.VIP]; taken {
			c.problem(s.Where, "%s as a VIP: %s", s.Key.VIP, p.What)
			continue
		}
		c.ordered = append(c.ordered, s)
	}
	slices.SortFunc(c.ordered, func(a, b Service) int { return a.Key.Compare(b.Key) })
}

// wanted reports whether a node is not excluded, and has all the labels of the cluster document.
func (c *computation) wanted(n *Node) bool {
	return !n.Excluded && hasAll(n.Labels, c.in.Cluster.Labels)
}

// hasAll reports whether labels are all there with the values that are wanted.
func hasAll(labels, want map[string]string) bool {
	for k, v := range want {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// endpoints returns the endpoints of a service: those of its protocol, or where it has none of that, all of the name,
// because one portName may serve both protocols.
func (c *computation) endpoints(s Service) []*Endpoint {
	all := c.pods[portRef{s.Namespace, s.Service, s.PortName}]
	var own []*Endpoint
	for _, e := range all {
		if e.Proto == s.Key.Proto {
			own = append(own, e)
		}
	}
	if own == nil {
		return all
	}
	return own
}

// forwarding is the service's own choice or the fleet's.
func (c *computation) forwarding(s Service) ravel.Forwarding {
	if s.Forwarding != nil {
		return *s.Forwarding
	}
	return c.in.Fleet.Forwarding
}

func (c *computation) services() []ravel.VirtualService {
	services := make([]ravel.VirtualService, 0, len(c.ordered))
	for _, s := range c.ordered {
		v := ravel.VirtualService{Key: s.Key, Name: s.Name(), Scheduler: s.Scheduler, Flags: s.Flags, OnePacket: s.OnePacket}
		wished := c.realServers(s)
		switch agreed := c.in.Agreed; {
		case agreed == nil:
			v.RealServers = wished.servers()
		case agreed.Hold && agreed.keeps(s.Key):
			continue // below, as it is
		case agreed.Hold && agreed.Rosters == nil:
			continue
		case agreed.Hold:
			v.RealServers = wished.asLaidOut(agreed.Rosters[s.Key])
		default:
			v.RealServers = wished.inRoster(agreed.Rosters[s.Key], s)
			v.Coming = !v.TakesNewFlows() && wished.takes()
		}
		v.UpperThreshold, v.LowerThreshold = thresholds(s, v)
		services = append(services, v)
	}
	if agreed := c.in.Agreed; agreed != nil && agreed.Hold {
		services = append(services, c.kept()...)
		slices.SortFunc(services, func(a, b ravel.VirtualService) int { return a.Key.Compare(b.Key) })
	}
	return services
}

// thresholds divides those of a service among its real servers that take new flows, rounded up.
func thresholds(s Service, v ravel.VirtualService) (upper, lower int) {
	taking := 0
	for _, rs := range v.RealServers {
		if rs.Weight > 0 {
			taking++
		}
	}
	if taking == 0 || s.UpperThreshold == 0 {
		return 0, 0
	}
	upper = (s.UpperThreshold-1)/taking + 1
	// Rounding must not bring them together: with the lower one at the upper one, a full real server would never be free.
	lower = min((s.LowerThreshold+taking-1)/taking, upper-1)
	return upper, lower
}

// kept are the services that stay as the kernel has them, also those that the documents do not name.
func (c *computation) kept() []ravel.VirtualService {
	kept := slices.Clone(c.in.Agreed.Kept)
	names := make(map[ravel.ServiceKey]string, len(c.ordered))
	for _, s := range c.ordered {
		names[s.Key] = s.Name()
	}
	for i := range kept {
		kept[i].AsIs, kept[i].Name = true, names[kept[i].Key]
	}
	return kept
}

// counted is how many pods of a service a node has.
type counted struct {
	ready int // take new flows
	going int // keep those that they have
}

// wished are the real servers that one service should have, by address.
type wished struct {
	list       []wish
	forwarding ravel.Forwarding
	dead       map[netip.Addr]bool // of the fleet's dead those that count here
}

// wish is a real server, scaled.
type wish struct {
	roster.Wish
	last  int // the weight of its slots while it takes no new flows
	spare spare
}

// spare says for whom a real server that takes no new flows steps in, if need be.
type spare uint8

const (
	never    spare = iota
	cordoned       // has ready pods, and its node drains
	leaving        // has only terminating ones
)

// takes reports whether anybody is to take new flows.
func (w wished) takes() bool {
	return slices.ContainsFunc(w.list, func(one wish) bool { return one.Weight > 0 })
}

// servers are the real servers where no roster says otherwise.
func (w wished) servers() []ravel.RealServer {
	servers := make([]ravel.RealServer, 0, len(w.list))
	for _, one := range w.list {
		servers = append(servers, ravel.RealServer{Addr: one.Addr, Weight: one.Weight, LastWeight: one.last, Forwarding: w.forwarding})
	}
	return servers
}

// inRoster are the real servers as the roster lays them out. Those that are not wished, or not any more, take no new
// flows; where none of the wished ones has risen yet, the earlier ones still do.
func (w wished) inRoster(layout ravel.Roster, s Service) []ravel.RealServer {
	weight := make(map[netip.Addr]int, len(w.list))
	waits := false
	for _, one := range w.list {
		weight[one.Addr] = one.Weight
		waits = waits || one.Weight > 0
	}
	for _, e := range layout {
		if e.State == ravel.Active && weight[e.Addr] > 0 {
			waits = false
		}
	}
	sticky := s.Key.Proto == ravel.UDP && !s.OnePacket
	servers := make([]ravel.RealServer, 0, len(layout))
	for _, e := range layout {
		if e.State == ravel.Gone || w.dead[e.Addr] && sticky {
			// A UDP entry lives as long as its client sends, whatever the weight: only without the real server it ends.
			continue
		}
		rs := ravel.RealServer{Addr: e.Addr, LastWeight: e.Weight, Forwarding: w.forwarding}
		if e.State == ravel.Active && !w.dead[e.Addr] && (weight[e.Addr] > 0 || waits) {
			rs.Weight = e.Weight
		}
		servers = append(servers, rs)
	}
	return servers
}

// asLaidOut are the real servers of a roster, each of which takes flows that has slots and does not drain, whatever the
// documents say.
func (w wished) asLaidOut(layout ravel.Roster) []ravel.RealServer {
	servers := make([]ravel.RealServer, 0, len(layout))
	for _, e := range layout {
		if e.State == ravel.Gone {
			continue
		}
		rs := ravel.RealServer{Addr: e.Addr, LastWeight: e.Weight, Forwarding: w.forwarding}
		if e.State == ravel.Active {
			rs.Weight = e.Weight
		}
		servers = append(servers, rs)
	}
	return servers
}

// Wishes returns what the inputs ask of each service, also of those without a real server: what rosters are made from.
func Wishes(in Inputs) map[ravel.ServiceKey][]roster.Wish {
	c := computation{in: in}
	c.index()
	wishes := make(map[ravel.ServiceKey][]roster.Wish, len(c.ordered))
	for _, s := range c.ordered {
		list := c.realServers(s).list
		wishes[s.Key] = make([]roster.Wish, len(list))
		for i, one := range list {
			wishes[s.Key][i] = one.Wish
		}
	}
	return wishes
}

// RealServers returns the nodes that have pods of some service, whatever their health, each with the addresses that
// directors reach it by; sorted by name.
func RealServers(in Inputs) []Node {
	c := computation{in: in}
	c.index()
	found := map[string][2]bool{} // by family: IPv4, IPv6
	for _, s := range c.ordered {
		for _, e := range c.endpoints(s) {
			if e.Addr.Is4() == s.Key.VIP.Is4() {
				families := found[e.Node]
				families[0], families[1] = families[0] || e.Addr.Is4(), families[1] || !e.Addr.Is4()
				found[e.Node] = families
			}
		}
	}
	var nodes []Node
	for name, families := range found {
		n, eligible := c.nodes[name]
		if !eligible {
			continue
		}
		node := Node{Name: name}
		for i, unspecified := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			if addr, has := firstOf(n.Addrs, unspecified); has && families[i] && c.owner[addr] == name {
				node.Addrs = append(node.Addrs, addr)
			}
		}
		nodes = append(nodes, node)
	}
	slices.SortFunc(nodes, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	return nodes
}

func (c *computation) realServers(s Service) wished {
	endpoints := c.endpoints(s)
	if len(endpoints) == 0 {
		c.problem(s.Where, "service %s has no endpoints: nothing answers there", s.Name())
		return wished{}
	}
	byNode := make(map[string]counted, len(endpoints))
	for _, e := range endpoints {
		if e.Addr.Is4() != s.Key.VIP.Is4() {
			continue
		}
		n := byNode[e.Node]
		switch {
		case e.Terminating:
			n.going++
		case e.Ready:
			n.ready++
		default:
			continue
		}
		byNode[e.Node] = n
	}
	w := wished{forwarding: c.forwarding(s), list: make([]wish, 0, len(byNode))}
	for name, count := range byNode {
		node, eligible := c.nodes[name]
		if !eligible {
			continue
		}
		addr, has := firstOf(node.Addrs, s.Key.VIP)
		if !has {
			c.problem("nodes."+name, "has no %s address, so its pods of %s get no traffic", family(s.Key.VIP), s.Name())
			continue
		}
		if c.owner[addr] != name {
			continue
		}
		// The weight is the number of pods; a node without a ready one keeps its slots while it drains.
		one := wish{Wish: roster.Wish{Addr: addr, Node: name, Weight: count.ready}, last: count.ready}
		switch {
		case count.ready == 0:
			one.last, one.spare = count.going, leaving
		case node.Draining:
			one.Weight, one.spare = 0, cordoned
		}
		if c.in.EqualWeights {
			one.Weight, one.last = min(one.Weight, 1), min(one.last, 1)
		}
		if !node.Ready {
			one.Weight, one.spare = 0, never
		}
		w.list = append(w.list, one)
	}
	slices.SortFunc(w.list, func(a, b wish) int { return a.Addr.Compare(b.Addr) })
	// First scaled, then thinned out: who dies or drains changes nobody else's weight.
	if s.Scheduler == ravel.MH {
		if left := scaleWeights(w.list); left != "" {
			c.problem(s.Where, "%s", left)
		}
	}
	if agreed := c.in.Agreed; agreed != nil {
		w.list = slices.DeleteFunc(w.list, func(one wish) bool { return agreed.Drained[one.Node] })
	}
	w.stepIn()
	if c.in.Agreed != nil {
		c.bury(s, &w)
	}
	return w
}

// stepIn has others take new flows where nobody does: ready pods of nodes that drain, or else terminating ones. A node is
// cordoned before its pods are moved, and a service may have no other.
func (w *wished) stepIn() {
	for _, kind := range []spare{cordoned, leaving} {
		if w.takes() {
			return
		}
		for i := range w.list {
			if one := &w.list[i]; one.spare == kind {
				one.Weight = one.last
			}
		}
	}
}

// bury takes the dead out of what is wished, but never so many that fewer than the floor of those that should take flows
// are left: who sees that many dead is more likely wrong.
func (c *computation) bury(s Service, w *wished) {
	if len(c.in.Agreed.Dead) == 0 {
		return
	}
	taking, dead := 0, 0
	for _, one := range w.list {
		if one.Weight > 0 {
			taking++
			if c.in.Agreed.Dead[one.Addr] {
				dead++
			}
		}
	}
	if 100*(taking-dead) < c.in.Agreed.Floor*taking {
		c.problem(s.Where, "%d of %d real servers of %s seem dead; with fewer than %d %% left, all of them are used",
			dead, taking, s.Name(), c.in.Agreed.Floor)
		return
	}
	w.dead = c.in.Agreed.Dead
	w.list = slices.DeleteFunc(w.list, func(one wish) bool { return w.dead[one.Addr] })
}

// directors lists whom a realserver takes tunnelled packets from.
func (c *computation) directors() []netip.Addr {
	var addrs []netip.Addr
	for _, d := range c.in.Fleet.Directors {
		addrs = append(addrs, d.Addrs...)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

func (c *computation) redirects() []ravel.Redirect {
	if !c.in.Listed() {
		c.mendable("nodes."+c.in.Node, "start it with --node NAME as the list, or the cluster, has it; or add it there", "%s", NotListed)
	}
	if _, eligible := c.nodes[c.in.Node]; !eligible {
		return nil
	}
	var redirects []ravel.Redirect
	for _, s := range c.ordered {
		var ready, going []ravel.LocalPod
		for _, e := range c.endpoints(s) {
			if e.Node != c.in.Node || e.Addr.Is4() != s.Key.VIP.Is4() {
				continue
			}
			switch pod := netip.AddrPortFrom(e.Addr, e.Port); {
			case e.Terminating:
				going = append(going, pod)
			case e.Ready:
				ready = append(ready, pod)
			}
		}
		if len(ready) == 0 {
			ready = going
		}
		if len(ready) == 0 {
			continue
		}
		slices.SortFunc(ready, netip.AddrPort.Compare)
		r := ravel.Redirect{
			Key: s.Key, Name: s.Name(), Pods: slices.Compact(ready),
			Tunnelled:  c.forwarding(s) != ravel.Direct,
			Masquerade: c.in.Fleet.Masquerade,
		}
		if s.Key.Proto == ravel.TCP {
			r.MTU = c.in.Cluster.MTU[s.Key.VIP]
		}
		redirects = append(redirects, r)
	}
	return redirects
}

// firstOf returns the first address of the VIP's family.
func firstOf(addrs []netip.Addr, vip netip.Addr) (netip.Addr, bool) {
	for _, a := range addrs {
		if a.Is4() == vip.Is4() {
			return a, true
		}
	}
	return netip.Addr{}, false
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// addrsOf lists the VIPs of a list that is sorted by VIP.
func addrsOf[T any](list []T, vip func(T) netip.Addr) []ravel.Addr {
	var addrs []ravel.Addr
	for _, v := range list {
		a := ravel.Addr{VIP: vip(v)}
		if len(addrs) == 0 || addrs[len(addrs)-1] != a {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// selects reports whether a peer is for a director.
func (p FleetPeer) selects(d FleetDirector) bool {
	if len(p.Directors) == 0 && len(p.Labels) == 0 {
		return true
	}
	if slices.Contains(p.Directors, d.Name) {
		return true
	}
	return len(p.Labels) > 0 && hasAll(d.Labels, p.Labels)
}

// announce fills in the peers and routes of this director (promise P1: announce only what can be served).
func (c *computation) announce(state *ravel.State) {
	at := slices.IndexFunc(c.in.Fleet.Directors, func(d FleetDirector) bool { return d.Name == c.in.Node })
	if at < 0 {
		c.mendable("fleet.directors", "start it with --node NAME as the list has it, or add it to the list", "this director, %s, is not in the list, so it peers with nobody (the list has: %s)",
			c.in.Node, strings.Join(directorNames(c.in.Fleet.Directors), ", "))
		return
	}
	self := c.in.Fleet.Directors[at]
	for i, p := range c.in.Fleet.Peers {
		if !p.selects(self) {
			continue
		}
		peer := p.Peer
		peer.LocalASN = c.in.Fleet.ASN
		if slices.ContainsFunc(state.Peers, func(q ravel.Peer) bool { return q.Addr == peer.Addr }) {
			c.problem(fmt.Sprintf("fleet.peers[%d]", i), "this director has a session with %s by an entry before this one, so this one is left out", peer.Addr)
			continue
		}
		state.Peers = append(state.Peers, peer)
	}
	slices.SortFunc(state.Peers, ravel.Peer.Compare)
	if c.in.AttractNone {
		return
	}

	prepended, within := 0, slices.ContainsFunc(state.Peers, func(p ravel.Peer) bool { return p.ASN == p.LocalASN })
	lacks := map[bool]int{} // VIPs without a next hop, by "is IPv4"
	for services := range ByVIP(state.Services) {
		vip := services[0].Key.VIP
		if a := c.in.Agreed; a != nil && (vip.Is4() && a.Withdraw4 || vip.Is6() && a.Withdraw6) {
			continue
		}
		policy := c.policy(vip)
		// One that is coming does not take away what the others have.
		there := slices.DeleteFunc(slices.Clone(services), func(s ravel.VirtualService) bool { return s.Coming })
		if len(there) == 0 || !Served(there, policy.Announce == AnnounceAll) {
			continue
		}
		nextHop, has := firstOf(self.Addrs, vip)
		if !has {
			lacks[vip.Is4()]++
			continue
		}
		var path []uint32
		if policy.Prepend > 0 && !within {
			path = slices.Repeat([]uint32{c.in.Fleet.ASN}, policy.Prepend)
		} else if policy.Prepend > 0 {
			prepended++
		}
		state.Routes = append(state.Routes, ravel.Route{
			Prefix: netip.PrefixFrom(vip, vip.BitLen()), NextHop: nextHop,
			Communities: policy.Communities, LargeCommunities: policy.LargeCommunities,
			MED: policy.MED, LocalPref: policy.LocalPref, ASPath: path, NeedsAll: policy.Announce == AnnounceAll,
		})
	}
	if prepended > 0 {
		c.problem("fleet.prepend", "nothing is prepended to the paths of %d VIPs: a router of AS %d, which %s peers with, would take its "+
			"own number in them for a loop; set localPref instead", prepended, c.in.Fleet.ASN, self.Name)
	}
	for is4, n := range lacks {
		version := "IPv6"
		if is4 {
			version = "IPv4"
		}
		c.problem("fleet.directors."+self.Name, "has no %s address to be the next hop of %d VIPs, so it does not announce them", version, n)
	}
}

func directorNames(directors []FleetDirector) []string {
	names := make([]string, 0, len(directors))
	for _, d := range directors {
		names = append(names, d.Name)
	}
	slices.Sort(names)
	return names
}

// policy is that of the pool that has the VIP, or the fleet's.
func (c *computation) policy(vip netip.Addr) Policy {
	for _, pool := range c.in.Fleet.Pools {
		for _, p := range pool.Prefixes {
			if p.Contains(vip) {
				return pool.Policy
			}
		}
	}
	return c.in.Fleet.Policy
}

// ByVIP yields the services of one VIP after another, of a list that is sorted by key.
func ByVIP(services []ravel.VirtualService) iter.Seq[[]ravel.VirtualService] {
	return func(yield func([]ravel.VirtualService) bool) {
		for start := 0; start < len(services); {
			end := start + 1
			for end < len(services) && services[end].Key.VIP == services[start].Key.VIP {
				end++
			}
			if !yield(services[start:end]) {
				return
			}
			start = end
		}
	}
}

// Served reports whether the services of one VIP may be announced: one of them, or with all every one, has a real
// server that takes new flows.
func Served(services []ravel.VirtualService, all bool) bool {
	if all {
		return !slices.ContainsFunc(services, func(s ravel.VirtualService) bool { return !s.TakesNewFlows() })
	}
	return slices.ContainsFunc(services, ravel.VirtualService.TakesNewFlows)
}
