package desired

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/setdiff"
)

// Inputs are all that Compute looks at. Whoever makes them guarantees what the fields' comments say; the order of
// the elements of any list means nothing.
type Inputs struct {
	Role    ravel.Role
	Node    string // the name of this director or node, as Fleet.Directors or Cluster.Nodes has it
	Cluster Cluster
	Fleet   Fleet
	// AttractNone programs and shows everything, but announces nothing.
	AttractNone bool
	// EqualWeights gives every real server that takes new flows the weight 1, however many pods it has. It must be the
	// same on all directors.
	EqualWeights bool

	// Agreed is what the fleet agreed on; nil is for whoever asks what should be without asking the fleet: then the
	// wished real servers count, in the order of their addresses.
	Agreed *Agreed
}

// Agreed is what a process takes from the fleet.
type Agreed struct {
	// Rosters are the layouts of the services' tables. Those of services that are not here are empty.
	Rosters map[ravel.ServiceKey]ravel.Roster
	// Hold says that the documents have no effect: services stay as Kept has them. Others come as the rosters say, or
	// not at all while Rosters is nil, because they are not known.
	Hold bool
	// Kept is what the kernel holds while Hold, by key.
	Kept []ravel.VirtualService
	// Dead are addresses of real servers that the fleet has found dead.
	Dead map[netip.Addr]bool
	// Floor is the percentage of a service's real servers that stay in use, dead or not; 0 to 100.
	Floor int
	// Drained are the names of nodes that an operator drains.
	Drained map[string]bool
	// Withdraw4 and Withdraw6 say that this director serves on and announces no IPv4 or IPv6 VIP, because an operator
	// drains it, because it alone fails to reach the real servers of that family, or because its tables are wrong.
	Withdraw4, Withdraw6 bool
	// InUse are, for a realserver, the services for which a director's kernel has this node, sorted.
	InUse []ravel.ServiceKey
	// Unheard says, to a realserver, that InUse is not known yet.
	Unheard bool
}

// Same reports whether two agreements of one process are alike. Rosters are compared by where they are in memory, for they
// are never changed.
func (a *Agreed) Same(b *Agreed) bool {
	return a.Hold == b.Hold && a.Unheard == b.Unheard && a.Floor == b.Floor && a.Withdraw4 == b.Withdraw4 &&
		a.Withdraw6 == b.Withdraw6 && len(a.Kept) == len(b.Kept) && slices.Equal(a.InUse, b.InUse) &&
		maps.Equal(a.Dead, b.Dead) && maps.Equal(a.Drained, b.Drained) &&
		maps.EqualFunc(a.Rosters, b.Rosters, setdiff.Same[ravel.Roster])
}

// keeps reports whether a service is among those that stay as they are.
func (a *Agreed) keeps(key ravel.ServiceKey) bool {
	_, kept := slices.BinarySearchFunc(a.Kept, key, func(k ravel.VirtualService, key ravel.ServiceKey) int { return k.Key.Compare(key) })
	return kept
}

// NotListed is the Problem of a realserver that Listed tells nothing good of.
const NotListed = "this node is not in the list of nodes: directors do not know it, and what it holds stays as it is"

// Listed reports whether the cluster has a node of this name.
func (in Inputs) Listed() bool { return in.Cluster.HasNode(in.Node) }

// HasNode reports whether a node has the name.
func (c Cluster) HasNode(name string) bool {
	return slices.ContainsFunc(c.Nodes, func(n Node) bool { return n.Name == name })
}

// Cluster is what is to be balanced: from the cluster document, and the nodes and endpoints beside it.
type Cluster struct {
	Services  []Service
	Nodes     []Node
	Endpoints []Endpoint
	// Labels must all be on a node for it to be a real server; none means every node.
	Labels map[string]string
	// Pool are the VIPs that get the default service. No VIP is in it twice.
	Pool []PoolVIP
	// Default is the default service that Services have already; nil is none.
	Default *DefaultService
	// MTU is the largest packet of TCP flows of a VIP, either way; 1280 to 9216.
	MTU map[netip.Addr]int
}

// Service is one VIP:port of the cluster document. Keys are unique; the VIP is a global unicast address; the port is
// 1 to 65535.
type Service struct {
	Key       ravel.ServiceKey
	Namespace string
	Service   string
	PortName  string // matches Endpoint.PortName; may be empty
	Scheduler ravel.Scheduler
	Flags     ravel.SchedulerFlags
	OnePacket bool // UDP only
	// Forwarding is the service's own choice, or nil for the fleet's.
	Forwarding *ravel.Forwarding
	// UpperThreshold and LowerThreshold are for all real servers of the service together, in flows that one director
	// counts; both 0 is no limit, and the lower one is less than the upper. Both are 0 for mh.
	UpperThreshold, LowerThreshold int
	// Where is the place in the document, for problems: cluster.config["192.0.2.1"]["80"].
	Where string
}

// Name returns namespace/service:port, as people call it.
func (s Service) Name() string {
	name := s.Namespace + "/" + s.Service
	if s.PortName != "" {
		name += ":" + s.PortName
	}
	return name
}

// Node is a machine that may be a real server. Names are unique.
type Node struct {
	Name   string
	Addrs  []netip.Addr // internal addresses, in the order of preference; the first of a family counts
	Labels map[string]string
	Ready  bool
	// Draining takes new flows only of services that have nobody else to take them: a node that is cordoned.
	Draining bool
	// Excluded is no real server, as if it lacked a label of Cluster.Labels.
	Excluded bool
}

// Endpoint is one pod's address behind one port of a service.
type Endpoint struct {
	Namespace string
	Service   string
	PortName  string
	Proto     ravel.Proto
	Addr      netip.Addr
	Port      uint16 // the pod's own port, 1 to 65535
	Node      string
	// Ready takes new flows.
	Ready bool
	// Terminating was ready and is going: it keeps its flows, and takes new ones only of services that no real server with
	// a ready one is left of, and of those that its node gets.
	Terminating bool
}

// Announce says when a VIP that several services share may be announced.
type Announce uint8

const (
	// AnnounceAny wants one service with a real server that takes new flows.
	AnnounceAny Announce = iota
	// AnnounceAll wants that of every service of the VIP.
	AnnounceAll
)

// Fleet is how the VIPs are announced and served: from the fleet document.
type Fleet struct {
	ASN       uint32 // the directors' AS number; 0 while no peer is wanted
	Directors []FleetDirector
	// DirectorNodes are labels: nodes of the cluster that have all of them are directors too; see WithNodes. None: no node.
	DirectorNodes map[string]string
	Peers         []FleetPeer
	// Forwarding is for services that do not choose.
	Forwarding ravel.Forwarding
	// Masquerade is the original's RAVEL-MASQ: pods see the node's address instead of the client's.
	Masquerade bool
	// Policy is for VIPs that no pool has.
	Policy Policy
	// Pools are policies for parts of the VIPs. Their prefixes do not overlap.
	Pools []Pool
}

// FleetDirector is a member of the fleet. Names are unique.
type FleetDirector struct {
	Name     string
	Addrs    []netip.Addr // the next hops that it announces and the sources of its tunnels; one of a family at most
	RouterID netip.Addr   // BGP identifier (RFC 4271 section 4.2), IPv4; the zero value leaves the choice to the director
	Labels   map[string]string
}

// FleetPeer is a router that some of the directors peer with.
type FleetPeer struct {
	Peer ravel.Peer // its LocalASN is not set; Compute takes the fleet's
	// Directors and Labels choose directors by name and by labels; where both are empty, all of them.
	Directors []string
	Labels    map[string]string
}

// Policy is how VIPs are announced. Lists are sorted and without duplicates.
type Policy struct {
	Announce         Announce
	Communities      []ravel.Community
	LargeCommunities []ravel.LargeCommunity
	MED              *uint32
	LocalPref        *uint32
	// Prepend is how many times more than once the fleet's AS number stands in the path that eBGP peers get.
	Prepend int
}

// Pool is the policy for the VIPs within some prefixes.
type Pool struct {
	Name     string
	Prefixes []netip.Prefix
	Policy   Policy
}

// DefaultHoldTime is for peers of the fleet document that set none: the least that RFC 4271 allows, because a dead
// director's flows wait for it.
const DefaultHoldTime = 3 * time.Second
