package maglev

import (
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"testing"

	"github.com/ravel-lb/ravel"
)

// sample is a service with 30 real servers of weights 1 to 63, of which one in five drains and one has never had a
// weight.
func sample(v6 bool) ravel.VirtualService {
	v := ravel.VirtualService{
		Key:       ravel.ServiceKey{VIP: netip.MustParseAddr("192.0.2.1"), Proto: ravel.TCP, Port: 443},
		Scheduler: ravel.MH, Flags: ravel.HashPort | ravel.Fallback,
	}
	addr := netip.MustParseAddr("10.8.0.1")
	if v6 {
		v.Key.VIP, addr = netip.MustParseAddr("2001:db8:1::1"), netip.MustParseAddr("2001:db8:8::1")
	}
	for i := range 30 {
		rs := ravel.RealServer{Addr: addr, Weight: 1 + i*37%63, LastWeight: 1 + i*37%63}
		if i%5 == 3 {
			rs.Weight = 0
		}
		if i == 17 {
			rs.Weight, rs.LastWeight = 0, 0
		}
		v.RealServers = append(v.RealServers, rs)
		addr = addr.Next()
	}
	return v
}

// clients returns 1,000 flows.
func clients(v6 bool) []netip.AddrPort {
	addr := netip.MustParseAddr("198.18.0.0")
	if v6 {
		addr = netip.MustParseAddr("2001:db8:2::")
	}
	var flows []netip.AddrPort
	for i := range 1000 {
		flows = append(flows, netip.AddrPortFrom(addr, uint16(1024+i*41)))
		if i%3 > 0 {
			addr = addr.Next()
		}
	}
	return flows
}

// hashed returns the FNV-1a hash of numbers.
func hashed(n int, number func(int) int) uint64 {
	h := fnv.New64a()
	for i := range n {
		_ = binary.Write(h, binary.BigEndian, int32(number(i)))
	}
	return h.Sum64()
}

// TestKnownAnswers holds Build and Pick to what ip_vs_mh.c of Linux 6.1 computed, compiled once for each size that it
// can have: hashes of all owners and of the picks of 1,000 clients.
func TestKnownAnswers(t *testing.T) {
	known := []struct {
		size                             Size
		owners4, picks4, owners6, picks6 uint64
	}{
		{251, 0xc3a34500201bd090, 0x77737619eae2da8a, 0xb73d2997b4c57af0, 0xf9f1466daf7e9a24},
		{509, 0x9ed506afe7bd6f42, 0x480e8802e0d8c00b, 0x64853671eaee00b2, 0x6148f23bd6d74d2b},
		{1021, 0x7cf5466fa0c3aab7, 0x99d8b6025a141b72, 0xb4ffd842480e2f07, 0x140faa1f4fe016b0},
		{2039, 0x1e1c465f0ac6e6f1, 0x278c8532cc3cd98a, 0xe11aa1dd4f0aca41, 0x2f77f0084bec7148},
		{4093, 0x8fe171a5b241fa49, 0x0ccd356578a8a94a, 0x9ed807c7e9677009, 0x20fdcc189b47a5bf},
		{8191, 0xa486c941f02ed28d, 0xfcf2e89daa38d260, 0x17331084e560204d, 0x003ae757f9fafa70},
		{16381, 0x10e27b9fae450e29, 0x473cad007e703f65, 0x17095811d0a68a79, 0x062898151cf54733},
		{32749, 0x7ff6b62b3c9df70d, 0x5438dd35db71664d, 0x53e8ca1d5d0ad0fd, 0x83e7fcfaf7b98786},
		{65521, 0x6bd3cf255c97b246, 0x7c742f1b7727e8f0, 0x07293e87dbe3a666, 0x77387cfb19bcaa28},
		{131071, 0xd80d52198b068cf9, 0x1f35654148caeb20, 0x7caf2a95c62ad659, 0x6ba06dcd4ece5f0b},
	}
	if len(known) != len(Sizes()) {
		t.Errorf("%d sizes are known, want %d", len(known), len(Sizes()))
	}
	for _, k := range known {
		for _, family := range []struct {
			v6            bool
			owners, picks uint64
		}{{false, k.owners4, k.picks4}, {true, k.owners6, k.picks6}} {
			table := Build(k.size, sample(family.v6))
			if got := hashed(int(k.size), table.Owner); got != family.owners {
				t.Errorf("%d slots, IPv6 %t: owners %#x, want %#x", k.size, family.v6, got, family.owners)
			}
			flows := clients(family.v6)
			pick := func(i int) int { index, _ := table.Pick(flows[i]); return index }
			if got := hashed(len(flows), pick); got != family.picks {
				t.Errorf("%d slots, IPv6 %t: picks %#x, want %#x", k.size, family.v6, got, family.picks)
			}
		}
	}
}
