// Package maglev computes the kernel's Maglev table (net/netfilter/ipvs/ip_vs_mh.c) in user space, slot by slot and
// flow by flow the same as a 64-bit little-endian kernel does, for IPv4 and IPv6. It asks the kernel nothing: the table is a pure
// function of the list of real servers in its order, their last weights, the port, the flags and the number of slots.
package maglev

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
)

// Table is the Maglev table of one service, with which of its real servers take new flows. It is never changed after
// Build, so any number of goroutines may use it.
type Table struct {
	size     Size
	v6       bool
	hashPort bool
	fallback bool
	owners   []int32 // of each slot: an index into reals, or nobody
	reals    []ravel.RealServer
}

const nobody = -1

// ftpData is the client's port from which IPVS schedules no new flow, whatever the service and the scheduler
// (ip_vs_schedule, FTPDATA): it lets the packets pass, to this host's own sockets.
const ftpData = 20

// Build computes the table that a kernel with tables of that size holds for a service: v's real servers in their order,
// the kernel's list. A real server with a weight owns slots by it, one without by its LastWeight. Of v it reads besides
// only the port, the family of the VIP, and the flags HashPort and Fallback; that its scheduler is mh is for the caller
// to know.
//
// No slot has an owner where no real server has had a weight, where size is none of Sizes, and where there are more real
// servers than slots: a kernel then refuses to build the table and keeps whatever it had.
func Build(size Size, v ravel.VirtualService) *Table {
	t := &Table{
		size: size, reals: v.RealServers, v6: v.Key.VIP.Is6(),
		hashPort: v.Flags&ravel.HashPort != 0, fallback: v.Flags&ravel.Fallback != 0,
	}
	if size.Index() == 0 {
		t.size = 0
		return t
	}
	t.owners = make([]int32, size)
	for i := range t.owners {
		t.owners[i] = nobody
	}
	if len(v.RealServers) <= int(size) {
		t.fill(v.Key.Port)
	}
	return t
}

// walker is a real server on its way through the slots, in an order of its own (struct ip_vs_mh_dest_setup).
type walker struct {
	at, skip uint32
	turns    int
}

// fill gives every slot an owner (ip_vs_mh_permutate and ip_vs_mh_populate): in rounds, in the order of the list, each
// real server takes as many slots as it has turns, the next free ones in its order.
func (t *Table) fill(port uint16) {
	divisor, shift := scale(t.size, t.reals)
	if divisor == 0 {
		return
	}
	size := uint32(t.size)
	walkers := make([]walker, len(t.reals))
	for i, rs := range t.reals {
		key := fold(rs.Addr, t.v6) + uint32(port)
		w := walker{at: hash1(key) % size, skip: hash2(key)%(size-1) + 1}
		if last := lastWeight(rs); last > 0 {
			w.turns = max(1, (last/divisor)>>shift)
		}
		walkers[i] = w
	}
	for left := len(t.owners); ; {
		for i := range walkers {
			w := &walkers[i]
			for range w.turns {
				for t.owners[w.at] != nobody {
					if w.at += w.skip; w.at >= size {
						w.at -= size
					}
				}
				t.owners[w.at] = int32(i)
				if left--; left == 0 {
					return
				}
			}
		}
	}
}

// scale returns what brings last weights into the range that a table of that size keeps (ip_vs_mh_gcd_weight and
// ip_vs_mh_shift_weight): their greatest common divisor, 0 if there are none, and how often to halve them then.
func scale(size Size, reals []ravel.RealServer) (divisor, shift int) {
	largest := 0
	for _, rs := range reals {
		last := lastWeight(rs)
		largest = max(largest, last)
		for last > 0 { // Euclid
			last, divisor = divisor%last, last
		}
	}
	if divisor == 0 {
		return 0, 0
	}
	return divisor, max(0, bits.Len(uint(largest/divisor))-size.Index()/2)
}

// lastWeight is what the kernel keeps as last_weight: the weight, or the last one that was not 0.
func lastWeight(rs ravel.RealServer) int {
	if rs.Weight > 0 {
		return rs.Weight
	}
	return max(0, rs.LastWeight)
}

// fold is what the kernel hashes of an address: the exclusive or of its four 32-bit words for a service of IPv6, the
// first word for one of IPv4.
func fold(a netip.Addr, v6 bool) uint32 {
	if !a.IsValid() {
		return 0
	}
	if a.Is4() {
		b := a.As4()
		return binary.BigEndian.Uint32(b[:])
	}
	b := a.As16()
	words := binary.BigEndian.Uint32(b[:])
	if v6 {
		words ^= binary.BigEndian.Uint32(b[4:]) ^ binary.BigEndian.Uint32(b[8:]) ^ binary.BigEndian.Uint32(b[12:])
	}
	return words
}

// key is what the kernel hashes of a client. It says no for one that cannot be a client of the service, which is one of
// another family.
func (t *Table) key(client netip.AddrPort) (uint32, bool) {
	a := client.Addr()
	if !t.v6 {
		a = a.Unmap()
	}
	if t.size == 0 || !a.IsValid() || a.Is6() != t.v6 {
		return 0, false
	}
	key := fold(a, t.v6)
	if t.hashPort {
		key += uint32(client.Port())
	}
	return key, true
}

// Size returns the number of slots, 0 if the table was built with a size that no kernel has.
func (t *Table) Size() Size { return t.size }

// Slot returns the slot of a client's flow, the same for every list of real servers; -1 if the client's address is not
// of the service's family. The client's port counts only with the flag HashPort.
func (t *Table) Slot(client netip.AddrPort) int {
	key, ok := t.key(client)
	if !ok {
		return -1
	}
	return t.slot(key)
}

func (t *Table) slot(key uint32) int { return int(hash1(key) % uint32(t.size)) }

// Owner returns the real server that owns a slot, whether it takes new flows or not: its index in the list, or -1 if
// there is none, as for a slot that the table has not.
func (t *Table) Owner(slot int) int {
	if slot < 0 || slot >= len(t.owners) {
		return nobody
	}
	return int(t.owners[slot])
}

// Pick returns the real server that the kernel gives a new flow to, by its index in the list; false if none, which the
// kernel answers with an ICMP port unreachable. No flow from the client's port 20 is given to any: IPVS takes it for
// FTP's data, and its packets pass on to the director's own sockets.
func (t *Table) Pick(client netip.AddrPort) (index int, ok bool) { return t.PickBut(client) }

// PickBut is Pick as it would be if the real servers with some indices had weight 0: who takes the flow when they drain
// or die. (What would happen if they were removed, the table of the shorter list tells.)
func (t *Table) PickBut(client netip.AddrPort, except ...int) (index int, ok bool) {
	index, _, ok = t.Try(client, except...)
	return index, ok
}

// Try is PickBut that tells how many other slots were looked at because the real servers that own the earlier ones take
// no new flows; 0 where the owner of the flow's own slot takes it.
func (t *Table) Try(client netip.AddrPort, except ...int) (index, tries int, ok bool) {
	key, ok := t.key(client)
	if !ok || client.Port() == ftpData {
		return nobody, 0, false
	}
	slot := t.slot(key)
	owner := int(t.owners[slot])
	if owner == nobody || t.takes(owner, except) {
		return owner, 0, owner != nobody
	}
	if !t.fallback {
		return nobody, 0, false
	}
	// Try other slots, which depend on the flow and not on the slot alone, so that the flows of one real server go to
	// all the others (ip_vs_mh_get_fallback).
	for offset := range t.owners {
		again := key + uint32((slot+offset)%len(t.owners))
		if owner := int(t.owners[t.slot(again)]); t.takes(owner, except) {
			return owner, offset + 1, true
		}
	}
	return nobody, len(t.owners), false
}

func (t *Table) takes(owner int, except []int) bool {
	return t.reals[owner].Weight > 0 && !slices.Contains(except, owner)
}

// Slots returns how many slots each real server owns, in the order of the list. Those of one with weight 0 count too.
func (t *Table) Slots() []int {
	slots := make([]int, len(t.reals))
	for _, owner := range t.owners {
		if owner != nobody {
			slots[owner]++
		}
	}
	return slots
}
