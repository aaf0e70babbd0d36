// Package ravel holds the nouns of Ravel, a layer-4 load balancer for bare-metal Kubernetes: what a virtual service,
// a real server, a redirect, a peer, a route is. It is the dictionary for every other package and needs nothing but
// the standard library.
//
// A fleet of directors announces virtual IPs (VIPs) by BGP and spreads packets for them over real servers with the
// kernel's IPVS; the realserver agent on each node hands them to pods. Values of these types are computed whole, by
// internal/desired, and never changed afterwards: whoever wants another value makes another one.
package ravel

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"
)

// Proto is a transport protocol by its IANA number, as IPVS and iptables know it.
type Proto uint8

// The protocols that Ravel balances.
const (
	TCP Proto = 6  // RFC 9293
	UDP Proto = 17 // RFC 768
)

// String returns the protocol as iptables spells it: "tcp", "udp", or "proto-N" for any other.
func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return fmt.Sprintf("proto-%d", uint8(p))
}

// MarshalText writes String.
func (p Proto) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads "tcp" or "udp" in any case, and refuses all else.
func (p *Proto) UnmarshalText(b []byte) error {
	switch strings.ToLower(string(b)) {
	case "tcp":
		*p = TCP
	case "udp":
		*p = UDP
	default:
		return fmt.Errorf("protocol %q: want tcp or udp", b)
	}
	return nil
}

// ServiceKey names a virtual service. It is comparable: == and maps just work. The VIP is IPv4 or IPv6, never an
// IPv4-mapped IPv6 address and never with a zone.
type ServiceKey struct {
	VIP   netip.Addr
	Proto Proto
	Port  uint16 // 1 to 65535
}

// String returns the key as "tcp 192.0.2.1:80" or "udp [2001:db8::1]:53".
func (k ServiceKey) String() string {
	return k.Proto.String() + " " + netip.AddrPortFrom(k.VIP, k.Port).String()
}

// Compare orders keys by VIP (IPv4 before IPv6), then protocol, then port.
func (k ServiceKey) Compare(other ServiceKey) int {
	return cmp.Or(k.VIP.Compare(other.VIP), cmp.Compare(k.Proto, other.Proto), cmp.Compare(k.Port, other.Port))
}

// Scheduler is the name of a kernel IPVS scheduler (net/netfilter/ipvs/ip_vs_*.c).
type Scheduler string

// MH is the kernel's Maglev scheduler (ip_vs_mh.c) and Ravel's default: the only one by which directors that share
// no connection state pick the same real server for a flow.
const MH Scheduler = "mh"

// Schedulers returns the schedulers of the kernel, sorted.
func Schedulers() []Scheduler {
	return []Scheduler{"dh", "fo", "lblc", "lblcr", "lc", MH, "nq", "ovf", "rr", "sed", "sh", "twos", "wlc", "wrr"}
}

// Forwarding says how a director hands a packet to a real server.
type Forwarding uint8

const (
	// Auto is direct where the real server is on-link for the director, else tunnel. The director resolves it.
	Auto Forwarding = iota
	// Direct rewrites the destination MAC address only; the real server must be on-link.
	Direct
	// Tunnel wraps the packet in the real server's family: IPIP (RFC 2003) for IPv4, ip6ip6 (RFC 2473) for IPv6.
	Tunnel
)

// String returns "auto", "direct" or "tunnel".
func (f Forwarding) String() string {
	switch f {
	case Direct:
		return "direct"
	case Tunnel:
		return "tunnel"
	}
	return "auto"
}

// MarshalText writes String.
func (f Forwarding) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText reads "auto", "direct" or "tunnel" and refuses all else.
func (f *Forwarding) UnmarshalText(b []byte) error {
	for _, known := range []Forwarding{Auto, Direct, Tunnel} {
		if string(b) == known.String() {
			*f = known
			return nil
		}
	}
	return fmt.Errorf("forwarding %q: want auto, direct or tunnel", b)
}

// RealServer is a node as a virtual service sees it. Its port is the service's: neither direct routing nor a tunnel
// can change one, so the node's own redirect picks the pod and its port.
type RealServer struct {
	// Addr is the node's address, of the VIP's family.
	Addr netip.Addr
	// Weight is its share of new flows, 0 to 65535; 0 takes none and keeps those it has (it drains).
	Weight int
	// LastWeight is the weight that its slots in the Maglev table come from while Weight is 0 (ip_vs_mh.c,
	// last_weight). It equals Weight where that is not 0; 0 means that it owns no slot.
	LastWeight int
	// Forwarding is how packets reach it.
	Forwarding Forwarding
}

// SchedulerFlags are the three flag bits that each scheduler reads in its own way (IP_VS_SVC_F_SCHED1 to 3 in
// include/uapi/linux/ip_vs.h).
type SchedulerFlags uint32

const (
	// Fallback (mh-fallback, sh-fallback) sends a new flow whose real server has weight 0 to another one.
	Fallback SchedulerFlags = 0x08
	// HashPort (mh-port, sh-port) hashes the client's port with its address.
	HashPort SchedulerFlags = 0x10
	// Flag3 is the third bit; no scheduler of the kernel reads it.
	Flag3 SchedulerFlags = 0x20
)

// RouteProtocol is the rtm_protocol of every route that Ravel adds (rtnetlink(7)), by which it knows them again: a number
// that /etc/iproute2/rt_protos leaves free.
const RouteProtocol = 0x52

// VirtualService is what a director programs into IPVS for one key.
type VirtualService struct {
	Key       ServiceKey
	Name      string // namespace/service:port, for people; IPVS does not hold it
	Scheduler Scheduler
	Flags     SchedulerFlags
	OnePacket bool // UDP only: each datagram is scheduled by itself (IP_VS_SVC_F_ONEPACKET)
	// UpperThreshold and LowerThreshold are for each real server, in flows that this director alone counts: at the upper
	// one it takes no new flow until it has fewer than the lower one, or than three quarters of the upper one where that
	// is 0 (ip_vs_dest_flags). Both 0 is no limit; the lower one is less than the upper. Not for MH.
	UpperThreshold, LowerThreshold int
	// RealServers are in roster order: as the kernel's list holds them, newest first. The Maglev table depends on it
	// (ip_vs_mh.c fills it by walking the list). No address is in it twice.
	RealServers []RealServer
	// Coming says that somebody is to take flows and nobody does yet: the roster is not written, or its real servers have
	// not risen.
	Coming bool
	// AsIs says that the service stays as the kernel holds it: it is not known yet what it should be. The other fields
	// are what the kernel held when it was read.
	AsIs bool
}

// TakesNewFlows reports whether any real server has a weight.
func (s VirtualService) TakesNewFlows() bool {
	for _, rs := range s.RealServers {
		if rs.Weight > 0 {
			return true
		}
	}
	return false
}

// LocalPod is a pod on this node behind a redirect: the address and port that it listens on.
type LocalPod = netip.AddrPort

// Redirect is what a realserver programs into iptables for one key: VIP:port to the pods on its node.
type Redirect struct {
	Key  ServiceKey
	Name string // namespace/service:port, for people and for comments in the rules
	// Pods are sorted and without duplicates; each takes an equal share of new flows. All are of the VIP's family.
	Pods []LocalPod
	// Tunnelled says that a director may reach this node by a tunnel, so that the pods' MSS must leave room for it.
	Tunnelled bool
	// Masquerade says that the pods see the node's address instead of the client's.
	Masquerade bool
	// MTU is the largest packet that a TCP flow may have, either way, in bytes with the IP header: 1280 to 9216. 0 sets no
	// limit.
	MTU int
}
