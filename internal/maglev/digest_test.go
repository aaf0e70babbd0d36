package maglev

import (
	"encoding/binary"
	"hash/fnv"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/ravel-lb/ravel"
)

// These numbers never change: directors of two releases compare them.
func TestDigestGolden(t *testing.T) {
	rr := sample(false)
	rr.Scheduler = "rr"
	for _, test := range []struct {
		name             string
		size             Size
		v                ravel.VirtualService
		table, available uint64
	}{
		{"IPv4", DefaultSize, sample(false), 0xe63f78625c5536cb, 0x6674c0d43fb2812c},
		{"IPv6", 65521, sample(true), 0xddc712e9d9dbefd3, 0x0fe29dee13ef1482},
		{"round robin", DefaultSize, rr, 0xac811d4945569502, 0x6674c0d43fb2812c},
		{"nobody", DefaultSize, service(), 0xd1e0464093b9ce87, 0xfe1a162e1fcabe15},
	} {
		if table, available := Digest(test.size, test.v); table != test.table || available != test.available {
			t.Errorf("%s: %#x, %#x, want %#x, %#x", test.name, table, available, test.table, test.available)
		}
	}
}

// The digest is what its comment says.
func TestDigestAsDocumented(t *testing.T) {
	v := service(7, 0)
	v.RealServers[1].LastWeight = 5
	h, a := fnv.New64a(), fnv.New64a()
	first, second := netip.MustParseAddr("::ffff:10.8.0.1").As16(), netip.MustParseAddr("::ffff:10.8.0.2").As16()
	for _, part := range []any{
		uint8(1), uint8(2), []byte("mh"), uint32(0x18), uint16(80), uint32(4093), uint32(2), first, uint32(7), second, uint32(5),
	} {
		_ = binary.Write(h, binary.BigEndian, part)
	}
	for _, part := range []any{uint8(2), uint32(1), first} {
		_ = binary.Write(a, binary.BigEndian, part)
	}
	if table, available := Digest(DefaultSize, v); table != h.Sum64() || available != a.Sum64() {
		t.Errorf("%#x, %#x, want %#x, %#x", table, available, h.Sum64(), a.Sum64())
	}
}

// What the table comes from is in the digest, and nothing else is.
func TestDigestTells(t *testing.T) {
	base := with(service(1, 2, 3, 4), func(r []ravel.RealServer) []ravel.RealServer { r[3].Weight = 0; return r })
	other := func(scheduler ravel.Scheduler) ravel.VirtualService { v := base; v.Scheduler = scheduler; return v }
	for _, test := range []struct {
		name             string
		scheduler        ravel.Scheduler
		size             Size
		change           func(*ravel.VirtualService)
		table, available bool // differ
	}{
		{"nothing", "mh", 4093, func(v *ravel.VirtualService) {}, false, false},
		{"order", "mh", 4093, func(v *ravel.VirtualService) { r := v.RealServers; r[0], r[1] = r[1], r[0] }, true, false},
		{"an address", "mh", 4093, func(v *ravel.VirtualService) { v.RealServers[1].Addr = netip.MustParseAddr("10.9.9.9") }, true, true},
		{"a removal", "mh", 4093, func(v *ravel.VirtualService) { v.RealServers = v.RealServers[:3] }, true, false},
		{"a weight", "mh", 4093, func(v *ravel.VirtualService) { v.RealServers[0].Weight, v.RealServers[0].LastWeight = 9, 9 }, true, false},
		{"a drain", "mh", 4093, func(v *ravel.VirtualService) { v.RealServers[0].Weight = 0 }, false, true},
		{"a last weight", "mh", 4093, func(v *ravel.VirtualService) { v.RealServers[3].LastWeight = 9 }, true, false},
		{"the last weight of one with a weight", "mh", 4093, func(v *ravel.VirtualService) { v.RealServers[0].LastWeight = 9 }, false, false},
		{"the port", "mh", 4093, func(v *ravel.VirtualService) { v.Key.Port++ }, true, false},
		{"the VIP and the name", "mh", 4093, func(v *ravel.VirtualService) { v.Key.VIP, v.Name = v.Key.VIP.Next(), "x" }, false, false},
		{"our own flag", "mh", 4093, func(v *ravel.VirtualService) { v.Flags |= ravel.Flag3 }, false, false},
		{"no fallback", "mh", 4093, func(v *ravel.VirtualService) { v.Flags &^= ravel.Fallback }, true, false},
		{"no port in the hash", "mh", 4093, func(v *ravel.VirtualService) { v.Flags &^= ravel.HashPort }, true, false},
		{"forwarding", "mh", 4093, func(v *ravel.VirtualService) { v.RealServers[0].Forwarding = ravel.Tunnel }, false, false},
		{"the size", "mh", 8191, func(v *ravel.VirtualService) {}, true, false},
		{"the scheduler", "mh", 4093, func(v *ravel.VirtualService) { v.Scheduler = "sh" }, true, false},
		{"the size without mh", "wrr", 8191, func(v *ravel.VirtualService) {}, false, false},
		{"order without mh", "wrr", 4093, func(v *ravel.VirtualService) { r := v.RealServers; r[0], r[1] = r[1], r[0] }, true, false},
		{"a drain without mh", "wrr", 4093, func(v *ravel.VirtualService) { v.RealServers[0].Weight = 0 }, true, true},
		{"a last weight without mh", "wrr", 4093, func(v *ravel.VirtualService) { v.RealServers[3].LastWeight = 9 }, false, false},
	} {
		before := other(test.scheduler)
		after := with(before, func(r []ravel.RealServer) []ravel.RealServer { return r })
		test.change(&after)
		table, available := Digest(DefaultSize, before)
		table2, available2 := Digest(test.size, after)
		if table == 0 || available == 0 {
			t.Errorf("%s: a digest is 0", test.name)
		}
		if (table != table2) != test.table || (available != available2) != test.available {
			t.Errorf("%s: digests differ: %t, %t, want %t, %t", test.name, table != table2, available != available2, test.table, test.available)
		}
	}
}

// Equal digests mean equal tables.
func TestDigestMeansTheTable(t *testing.T) {
	tables := map[uint64]string{}
	random := rand.New(rand.NewPCG(3, 4))
	for range 3000 {
		weights := make([]int, random.IntN(4))
		for i := range weights {
			weights[i] = random.IntN(3)
		}
		v := service(weights...)
		digest, _ := Digest(251, v)
		owners := string(binary.BigEndian.AppendUint64(nil, hashed(251, Build(251, v).Owner)))
		if before, known := tables[digest]; known && before != owners {
			t.Fatalf("weights %v: another table under the digest %#x", weights, digest)
		}
		tables[digest] = owners
	}
}
