// Package roster decides what is to be written into the fleet's rosters: the order and the last weights of the real
// servers of each service, from which every director builds the same Maglev table.
//
// A roster is the layout of a table, and belongs to the fleet. Who takes new flows at this moment is another matter:
// each director lowers the weight of what it does not wish at once and by itself, while the slots stay. So a layout can
// wait until the directors agree, and it does: entries are drained, removed and given other weights only when the live
// directors wish the same for the service. Until then newcomers may come, and nothing goes. Directors whose inputs
// differ therefore never write against each other, and equal inputs lead to equal writes, which merge to one.
//
// An entry's life:
//
//	(none) ──► Joining ──► Active ──► Draining ──► Gone ──► (forgotten)
//	              │           ▲           │          │
//	              └──► Gone   └───────────┘          └──► Joining, in a new place
//
// next.go has the rules, one a case; Keeper adds what time adds.
package roster

import (
	"cmp"
	"hash/fnv"
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
)

// Wish is what a director's inputs ask of one real server of one service.
type Wish struct {
	Addr netip.Addr
	Node string // whose address it is
	// Weight is the scaled weight; 0 keeps the slots that it has and takes no new flows, as for a node whose pods all
	// terminate.
	Weight int
}

// Hash is equal for equal wishes, whatever their order, and 0 for none. It is FNV-1a over addresses and weights by
// address; every release computes the same.
func Hash(wishes []Wish) uint64 {
	if len(wishes) == 0 {
		return 0
	}
	sorted := slices.SortedFunc(slices.Values(wishes), func(a, b Wish) int { return a.Addr.Compare(b.Addr) })
	h := fnv.New64a()
	for _, w := range sorted {
		addr := w.Addr.As16()
		_, _ = h.Write(addr[:])
		_, _ = h.Write([]byte{byte(w.Weight >> 8), byte(w.Weight)})
	}
	return max(h.Sum64(), 1)
}

// Newer reports whether a counts where a and b are about the same real server: the higher stamps do. Between equal
// stamps any fixed order does.
func Newer(a, b ravel.RosterEntry) bool {
	return cmp.Or(cmp.Compare(a.Birth, b.Birth), cmp.Compare(a.Rev, b.Rev), cmp.Compare(a.State, b.State),
		cmp.Compare(a.Weight, b.Weight), cmp.Compare(a.By, b.By), cmp.Compare(a.Unknown, b.Unknown)) > 0
}

// Merge returns a roster with these entries in it, where they are newer than what it has. r is not changed.
func Merge(r ravel.Roster, entries ...ravel.RosterEntry) ravel.Roster {
	merged := slices.Clone(r)
	for _, e := range entries {
		if i := slices.IndexFunc(merged, func(old ravel.RosterEntry) bool { return old.Addr == e.Addr }); i < 0 {
			merged = append(merged, e)
		} else if Newer(e, merged[i]) {
			merged[i] = e
		}
	}
	slices.SortFunc(merged, ravel.RosterEntry.Compare)
	return merged
}

// Seed is the roster that a kernel's list comes to, newest first: for a director that starts with what an earlier
// process left in the kernel and finds no roster in the fleet. Each entry gets a birth of its own, because the list has
// an order and says nothing of when. saved are the last weights of those that have weight 0 now, which the kernel does
// not tell; where there is none, the wished weight will do, else 1.
func Seed(self string, list []ravel.RealServer, wishes []Wish, saved ravel.Roster) ravel.Roster {
	seed := make(ravel.Roster, 0, len(list))
	for i, rs := range list {
		e := ravel.RosterEntry{Addr: rs.Addr, Birth: uint64(len(list) - i), State: ravel.Active, Weight: rs.Weight}
		if rs.Weight == 0 {
			e.State, e.By, e.Weight = ravel.Draining, self, max(1, rs.LastWeight)
			if old, known := saved.Find(rs.Addr); known && old.Weight > 0 {
				e.Weight = old.Weight
			} else if at := slices.IndexFunc(wishes, func(w Wish) bool { return w.Addr == rs.Addr }); at >= 0 && rs.LastWeight == 0 {
				e.Weight = max(1, wishes[at].Weight)
			}
		}
		seed = append(seed, e)
	}
	return seed
}

// Fits reports whether a saved roster may be the one that a kernel's list was made by: the same real servers in the
// same order, with those weights that can be read.
func Fits(saved ravel.Roster, list []ravel.RealServer) bool {
	at := 0
	for _, e := range saved {
		if e.State == ravel.Gone {
			continue
		}
		if at == len(list) || list[at].Addr != e.Addr || list[at].Weight != 0 && list[at].Weight != e.Weight {
			return false
		}
		at++
	}
	return at == len(list)
}
