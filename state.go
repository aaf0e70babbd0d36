package ravel

import (
	"cmp"
	"fmt"
	"net/netip"
	"time"
)

// State is what one process should make true. desired.Compute makes it whole; it is never changed after. Its slices
// are sorted and without duplicates, so that equal states print equal.
type State struct {
	Services  []VirtualService // for IPVS, by key; empty on a realserver
	Addrs     []Addr           // VIPs that a link of ours holds, by address
	Peers     []Peer           // BGP sessions, by address
	Routes    []Route          // BGP announcements, by prefix
	Redirects []Redirect       // for iptables, by key; empty on a director
	Directors []netip.Addr     // whom a realserver takes tunnelled packets from, sorted
	// InUse are, on a realserver, the services for which a director's kernel has this node, sorted: their redirects stay
	// even when they are wanted no more.
	InUse []ServiceKey
	// Unheard says that the fleet was not heard yet, so that every service may be in use.
	Unheard bool
}

// Addr is a VIP that this host holds.
type Addr struct {
	VIP netip.Addr
}

// Compare orders addresses, IPv4 first.
func (a Addr) Compare(b Addr) int { return a.VIP.Compare(b.VIP) }

// Community is a standard BGP community (RFC 1997): the high 16 bits are an AS number, the low ones a value.
type Community uint32

// String returns the community as "65000:120".
func (c Community) String() string { return fmt.Sprintf("%d:%d", uint32(c)>>16, uint32(c)&0xffff) }

// MarshalText writes String.
func (c Community) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText reads what String writes.
func (c *Community) UnmarshalText(b []byte) error {
	var high, low uint16
	if n, err := fmt.Sscanf(string(b), "%d:%d", &high, &low); n != 2 || err != nil || Community(uint32(high)<<16|uint32(low)).String() != string(b) {
		return fmt.Errorf("community %q: want two numbers to 65535 such as 65100:1", b)
	}
	*c = Community(uint32(high)<<16 | uint32(low))
	return nil
}

// LargeCommunity is a large BGP community (RFC 8092).
type LargeCommunity struct {
	Global, Local1, Local2 uint32
}

// String returns the community as "65000:1:2".
func (c LargeCommunity) String() string { return fmt.Sprintf("%d:%d:%d", c.Global, c.Local1, c.Local2) }

// MarshalText writes String.
func (c LargeCommunity) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText reads what String writes.
func (c *LargeCommunity) UnmarshalText(b []byte) error {
	var read LargeCommunity
	if n, err := fmt.Sscanf(string(b), "%d:%d:%d", &read.Global, &read.Local1, &read.Local2); n != 3 || err != nil || read.String() != string(b) {
		return fmt.Errorf("large community %q: want three numbers such as 65100:1:2", b)
	}
	*c = read
	return nil
}

// Compare orders large communities by their three numbers.
func (c LargeCommunity) Compare(d LargeCommunity) int {
	return cmp.Or(cmp.Compare(c.Global, d.Global), cmp.Compare(c.Local1, d.Local1), cmp.Compare(c.Local2, d.Local2))
}

// Peer is one BGP session that a director keeps up (RFC 4271). It is comparable.
type Peer struct {
	Addr netip.Addr // the router's address; the session runs over its family and carries both
	Port uint16     // the router's TCP port, 179 unless set
	ASN  uint32     // the router's AS number; equal to LocalASN for iBGP
	// LocalASN is the AS number that the director shows to this peer. All peers of a director share it.
	LocalASN uint32
	// LocalAddr is the address that the session starts from; the zero value leaves it to the kernel.
	LocalAddr netip.Addr
	HoldTime  time.Duration // 3 s at least (RFC 4271 section 4.2)
	Keepalive time.Duration // a third of HoldTime unless set
	// Multihop is the TTL of an eBGP session to a router that is not on-link; 0 is single hop.
	Multihop uint8
	// PasswordFile names the file that holds the TCP MD5 key (RFC 2385); empty is none.
	PasswordFile string
	// Passive waits for the router's connection instead of dialling. It needs a listening port.
	Passive bool
}

// Compare orders peers by address, then port.
func (p Peer) Compare(q Peer) int { return cmp.Or(p.Addr.Compare(q.Addr), cmp.Compare(p.Port, q.Port)) }

// Route is one BGP announcement: a VIP as a /32 or /128.
type Route struct {
	Prefix netip.Prefix
	// NextHop is this director's address of the prefix's family.
	NextHop netip.Addr
	// Communities and LargeCommunities are sorted and without duplicates.
	Communities      []Community
	LargeCommunities []LargeCommunity
	MED              *uint32 // multi-exit discriminator; nil sends none
	LocalPref        *uint32 // for iBGP peers; nil sends GoBGP's default
	// ASPath is the AS_PATH before a session to an eBGP peer puts its own number in front (RFC 4271 section 5.1.2): the
	// director's AS, as many times as it is to be prepended.
	ASPath []uint32
	// NeedsAll says that every service of the VIP must take new flows for the route to exist, not just one of them.
	// It is not sent.
	NeedsAll bool
}

// Compare orders routes by prefix.
func (r Route) Compare(s Route) int { return r.Prefix.Addr().Compare(s.Prefix.Addr()) }

// Problem is something wrong that stops nothing else: a part of the input that was left out, a setting of the host
// that is not as it should be. It is a value, so that it can be logged, counted and shown by `ravel check`.
type Problem struct {
	Where string // the place: a path in a document, a sysctl, a link
	What  string // what is wrong there, and what was done about it
	Fix   string // the command or change that mends it, if one is known
}

// Compare orders problems by place, then by what is wrong.
func (p Problem) Compare(other Problem) int {
	return cmp.Or(cmp.Compare(p.Where, other.Where), cmp.Compare(p.What, other.What))
}

// String returns the problem on one line.
func (p Problem) String() string {
	s := p.Where + ": " + p.What
	if p.Fix != "" {
		s += " (" + p.Fix + ")"
	}
	return s
}
