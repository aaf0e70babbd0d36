package director

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// TestPlan does what plans say to random lists: they end as wanted, and as few are added again as can be.
func TestPlan(t *testing.T) {
	random := rand.New(rand.NewPCG(seed(t), 3))
	list := func(wanted bool) service {
		s := service{scheduler: "mh"}
		for _, n := range random.Perm(6)[:random.IntN(7)] {
			r := real{at: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n + 1)}), 80), weight: random.IntN(4)}
			if r.last = r.weight; r.weight == 0 {
				if r.last = random.IntN(4); !wanted && random.IntN(3) == 0 {
					r.last = unknown
				}
			}
			s.reals = append(s.reals, r)
		}
		return s
	}
	for range 20000 {
		have, want := list(false), list(true)
		steps := plan(have, want)
		now := slices.Clone(have.reals)
		again := 0
		for _, s := range steps {
			at := slices.IndexFunc(now, func(r real) bool { return r.at == s.real.at })
			if (at < 0) != (s.op == addReal && !s.again) {
				t.Fatalf("%+v is planned where its place is %d, for %+v to %+v: %+v", s, at, have.reals, want.reals, steps)
			}
			r := s.real
			if r.last = r.weight; r.weight == 0 && s.op == editReal {
				r.last = now[at].last
			}
			switch {
			case s.op == editReal:
				now[at] = r
				continue
			case s.again:
				again++
				fallthrough
			case s.op == delReal:
				now = slices.Delete(now, at, at+1)
			}
			if s.op == addReal {
				now = slices.Insert(now, 0, r)
			}
		}
		if !slices.Equal(now, want.reals) {
			t.Fatalf("%+v to %+v ends in %+v: %+v", have.reals, want.reals, now, steps)
		}
		if least := fewest(have.reals, want.reals); again < least || again > least+1 {
			t.Fatalf("%d are added again, and %d must be, for %+v to %+v: %+v", again, least, have.reals, want.reals, steps)
		}
	}
}

// fewest returns how many must be added again: those before the longest tail of want that can stay.
func fewest(have, want []real) int {
	place := func(w real) int { return slices.IndexFunc(have, func(h real) bool { return h.at == w.at }) }
	stays := func(tail []real) bool {
		var places []int
		for _, w := range tail {
			at := place(w)
			if at < 0 || w.weight == 0 && w.last == 0 && have[at].last != 0 {
				return false
			}
			places = append(places, at)
		}
		return slices.IsSorted(places)
	}
	for n := range len(want) + 1 {
		if !stays(want[n:]) {
			continue
		}
		least := 0
		for _, w := range want[:n] {
			if place(w) >= 0 {
				least++
			}
		}
		return least
	}
	panic("an empty tail stays")
}
