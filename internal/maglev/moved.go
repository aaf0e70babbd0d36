package maglev

import (
	"net/netip"

	"github.com/ravel-lb/ravel"
)

// Moved tells how two tables of one service differ for new flows: what a change would move.
//
// slots counts those whose new flows go to another real server than before: their owner is another one, or takes new
// flows in one of the tables only. The flows of a slot whose owner takes none are spread over the others by the flag
// Fallback; from spread to spread such a slot does not count, though some of its flows may move.
//
// share is the part of all new flows that go elsewhere, 0 to 1, if clients hash evenly. It counts all, also those.
//
// Real servers are told apart by address. Tables that hash in different ways (another size, the flag HashPort in one
// only) have no slot in common: all slots of the larger one count.
func Moved(before, after *Table) (slots int, share float64) {
	a, b := outcomesOf(before), outcomesOf(after)
	inB, inA := places(before.reals, after.reals), places(after.reals, before.reals)
	if before.size != after.size || before.hashPort != after.hashPort || before.v6 != after.v6 {
		return int(max(before.size, after.size)), 1 - meet(a, b, inB)
	}
	if before.size == 0 {
		return 0, 0
	}
	// stay adds up the chance of each slot's flows to stay, first for those that at least one table decides.
	stay, bothSpread := 0.0, 0
	for slot := range before.owners {
		x, y := a.of(slot), b.of(slot)
		same := x == y
		if x >= 0 {
			same = inB[x] == y
		}
		if !same {
			slots++
		}
		switch {
		case x == spread && y == spread:
			bothSpread++
		case x == spread && y >= 0:
			stay += a.chance(inA[y])
		case x >= 0 && y == spread:
			stay += b.chance(inB[x])
		case same:
			stay++
		}
	}
	if bothSpread > 0 {
		// Each of their flows tries other slots, the same ones in both tables, until one decides: then it is as with a
		// flow that began there.
		stay += float64(bothSpread) * stay / float64(int(before.size)-bothSpread)
	}
	return slots, max(0, 1-stay/float64(before.size))
}

// What may become of a slot's flows besides going to its owner.
const (
	gone   = -2 // a real server that the other table has not
	spread = -3 // they go to whoever owns other slots
)

// outcomes is what becomes of the new flows of each slot.
type outcomes struct {
	t     *Table
	slots []int // that each real server owns and takes new flows of
	sum   int
}

func outcomesOf(t *Table) outcomes {
	o := outcomes{t: t, slots: t.Slots()}
	for i, rs := range t.reals {
		if rs.Weight <= 0 {
			o.slots[i] = 0
		}
		o.sum += o.slots[i]
	}
	return o
}

// of returns a real server's index, nobody or spread.
func (o outcomes) of(slot int) int {
	owner := o.t.Owner(slot)
	if owner == nobody || o.slots[owner] > 0 {
		return owner
	}
	if o.t.fallback && o.sum > 0 {
		return spread
	}
	return nobody
}

// chance is that of a real server to take a flow which is spread.
func (o outcomes) chance(i int) float64 {
	if i < 0 || o.sum == 0 {
		return 0
	}
	return float64(o.slots[i]) / float64(o.sum)
}

// takes is the share of all flows that are taken.
func (o outcomes) takes() float64 {
	if o.sum == 0 || o.t.fallback {
		return min(1, float64(o.sum))
	}
	return float64(o.sum) / float64(o.t.size)
}

// meet is the chance that a flow stays if the two tables hash it in different ways.
func meet(a, b outcomes, inB []int) float64 {
	stay := (1 - a.takes()) * (1 - b.takes())
	for i, j := range inB {
		stay += a.takes() * a.chance(i) * b.takes() * b.chance(j)
	}
	return stay
}

// places returns for each real server its index in another list, or gone.
func places(from, to []ravel.RealServer) []int {
	at := make(map[netip.Addr]int, len(to))
	for i, rs := range to {
		at[rs.Addr] = i
	}
	places := make([]int, len(from))
	for i, rs := range from {
		j, there := at[rs.Addr]
		if !there {
			j = gone
		}
		places[i] = j
	}
	return places
}
