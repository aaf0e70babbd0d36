package maglev

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
)

// Moved says what the picks of many flows say.
func TestMovedIsWhatFlowsDo(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	const flows = 20000
	for n := range 40 {
		weights := make([]int, 1+random.IntN(12))
		for i := range weights {
			weights[i] = 1 + random.IntN(9)
		}
		v := service(weights...)
		if random.IntN(4) == 0 {
			v.Flags &^= ravel.Fallback
		}
		change := func(reals []ravel.RealServer) []ravel.RealServer {
			for i := range reals {
				if random.IntN(4) == 0 {
					reals[i].Weight = 0
				}
			}
			switch random.IntN(4) {
			case 0:
				i := random.IntN(len(reals))
				return slices.Delete(reals, i, i+1)
			case 1:
				return slices.Insert(reals, 0, ravel.RealServer{Addr: netip.MustParseAddr("10.9.0.1"), Weight: 3, LastWeight: 3})
			case 2:
				random.Shuffle(len(reals), func(i, j int) { reals[i], reals[j] = reals[j], reals[i] })
			}
			return reals
		}
		from, to := with(v, change), with(v, change)
		size := Size(1021)
		switch random.IntN(8) {
		case 0:
			to.Flags ^= ravel.Fallback
		case 1:
			to.Flags ^= ravel.HashPort
		case 2:
			size = 2039
		}
		before, after := Build(1021, from), Build(size, to)
		moved := 0
		for range flows {
			client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{byte(random.Uint32()), byte(random.Uint32()), 1, 1}), uint16(random.Uint32()))
			var a, b netip.Addr
			if i, ok := before.Pick(client); ok {
				a = from.RealServers[i].Addr
			}
			if i, ok := after.Pick(client); ok {
				b = to.RealServers[i].Addr
			}
			if a != b {
				moved++
			}
		}
		slots, share := Moved(before, after)
		// Five standard deviations and a little for an uneven hash.
		if got := float64(moved) / flows; math.Abs(got-share) > 5*math.Sqrt(share*(1-share)/flows)+0.01 {
			t.Errorf("change %d: %.3f of the flows moved, want %.3f (%d slots)\nfrom %+v\nto %+v", n, got, share, slots, from, to)
		}
	}
}

func TestMovedSlots(t *testing.T) {
	v := service(even(10, 1)...)
	whole := Build(DefaultSize, v)
	drain := func(which ...int) *Table {
		return Build(DefaultSize, with(v, func(r []ravel.RealServer) []ravel.RealServer {
			for _, i := range which {
				r[i].Weight = 0
			}
			return r
		}))
	}
	owned := whole.Slots()
	for _, test := range []struct {
		name          string
		before, after *Table
		slots         int
		share         float64 // -1: do not care
	}{
		{"nothing", whole, whole, 0, 0},
		{"a drain", whole, drain(3), owned[3], float64(owned[3]) / 4093},
		{"a drain's undoing", drain(3), whole, owned[3], float64(owned[3]) / 4093},
		{"nothing during a drain", drain(3), drain(3), 0, 0},
		{"a second drain", drain(3), drain(3, 4), owned[4], -1},
		{"all drain", whole, drain(0, 1, 2, 3, 4, 5, 6, 7, 8, 9), 4093, 1},
		{"another size", whole, Build(8191, v), 8191, -1},
		{"nobody yet", Build(DefaultSize, service()), whole, 4093, 1},
		{"nobody", Build(DefaultSize, service()), Build(DefaultSize, service(0)), 0, 0},
	} {
		slots, share := Moved(test.before, test.after)
		if slots != test.slots || test.share >= 0 && math.Abs(share-test.share) > 1e-9 {
			t.Errorf("%s: %d slots, %v, want %d, %v", test.name, slots, share, test.slots, test.share)
		}
	}
}
