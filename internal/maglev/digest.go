package maglev

import (
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
)

// Digest returns two hashes by which directors compare what they hold of a service, on any release and machine. Neither
// is ever 0.
//
// table is of everything that the service's Maglev table comes from: the scheduler, the flags Fallback and HashPort, the
// port, the size, and in the order of the list the addresses and last weights. A service with another scheduler has no
// Maglev table: there the order and the weights count, but neither the size nor the last weights.
//
// available is of the set of real servers that have a weight, whatever their order.
//
// Each is the 64-bit FNV-1a hash of these bytes, numbers in network order and addresses in 16 bytes, IPv4 as
// ::ffff:a.b.c.d:
//
//	table:     1, length of the scheduler's name (1 byte), name, flags (4), port (2), size or 0 (4),
//	           number of real servers (4), of each: address (16), last weight or weight (4)
//	available: 2, number of addresses (4), the addresses in ascending order (16 each)
func Digest(size Size, v ravel.VirtualService) (table, available uint64) {
	mh := v.Scheduler == ravel.MH
	if !mh {
		size = 0
	}
	h := newFNV1a().byte(1).byte(byte(len(v.Scheduler))).string(string(v.Scheduler)).
		uint32(uint32(v.Flags & (ravel.Fallback | ravel.HashPort))).uint16(v.Key.Port).uint32(uint32(size)).
		uint32(uint32(len(v.RealServers)))
	takes := make([]netip.Addr, 0, len(v.RealServers))
	for _, rs := range v.RealServers {
		weight := max(0, rs.Weight)
		if weight > 0 {
			takes = append(takes, rs.Addr)
		}
		if mh {
			weight = lastWeight(rs)
		}
		h = h.addr(rs.Addr).uint32(uint32(weight))
	}
	slices.SortFunc(takes, netip.Addr.Compare)
	a := newFNV1a().byte(2).uint32(uint32(len(takes)))
	for _, addr := range takes {
		a = a.addr(addr)
	}
	return h.sum(), a.sum()
}

// fnv1a is the state of a 64-bit FNV-1a hash.
type fnv1a uint64

func newFNV1a() fnv1a { return 14695981039346656037 }

func (h fnv1a) byte(b byte) fnv1a { return (h ^ fnv1a(b)) * 1099511628211 }

func (h fnv1a) uint16(n uint16) fnv1a { return h.byte(byte(n >> 8)).byte(byte(n)) }

func (h fnv1a) uint32(n uint32) fnv1a { return h.uint16(uint16(n >> 16)).uint16(uint16(n)) }

func (h fnv1a) string(s string) fnv1a {
	for i := range len(s) {
		h = h.byte(s[i])
	}
	return h
}

func (h fnv1a) addr(a netip.Addr) fnv1a {
	for _, b := range a.As16() {
		h = h.byte(b)
	}
	return h
}

// sum is the hash; 0 means "not known" where digests are kept, so it is none.
func (h fnv1a) sum() uint64 { return max(1, uint64(h)) }
