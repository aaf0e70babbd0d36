package roster

import (
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
)

// Powers say how far the directors agree on what a service should be.
type Powers uint8

const (
	// None: nothing is written, as while the fleet is frozen or this director has not settled.
	None Powers = iota
	// Add: others wish differently. Newcomers come; nothing goes, and what others sent away stays away.
	Add
	// Full: the directors that count wish the same.
	Full
)

// Facts are what next asks of the world about one real server.
type Facts struct {
	// Ready reports whether a real server may take its first flow, or that from a drain on; was is Gone for one that is
	// in no roster.
	Ready func(w Wish, was ravel.RosterState) bool
	// DrainOver reports whether it is for this director to end a drain, and time to.
	DrainOver func(ravel.RosterEntry) bool
}

// next returns the entries that are to be written into a roster now, by address: the rules, one a case. It is pure.
func next(self string, r ravel.Roster, wishes []Wish, may Powers, facts Facts) []ravel.RosterEntry {
	if may == None {
		return nil
	}
	var changes []ravel.RosterEntry
	write := func(e ravel.RosterEntry) {
		e.Rev++
		changes = append(changes, e)
	}
	wish := make(map[netip.Addr]Wish, len(wishes))
	for _, w := range wishes {
		wish[w.Addr] = w
	}
	var birth uint64 // one above all in the roster
	bridged := !anyWeight(wishes)
	known := make(map[netip.Addr]ravel.RosterEntry, len(r))
	for _, e := range r {
		birth = max(birth, e.Birth)
		known[e.Addr] = e
		if e.State == ravel.Active && wish[e.Addr].Weight > 0 {
			bridged = true
		}
	}
	birth++

	for _, e := range r {
		w, wished := wish[e.Addr]
		switch {
		case e.State == ravel.Joining && !wished && may == Full:
			// It never had a flow, so there is nothing to drain.
			e.State = ravel.Gone
			write(e)
		case e.State == ravel.Joining && w.Weight > 0 && facts.Ready(w, e.State),
			e.State == ravel.Draining && w.Weight > 0 && may == Full && facts.Ready(w, e.State):
			e.State, e.Weight, e.By = ravel.Active, w.Weight, ""
			write(e)
		case e.State == ravel.Active && w.Weight > 0 && w.Weight != e.Weight && may == Full:
			e.Weight = w.Weight
			write(e)
		case e.State == ravel.Active && w.Weight == 0 && may == Full && bridged:
			// Not before another one takes the flows that it would have taken.
			e.State, e.By = ravel.Draining, self
			write(e)
		case e.State == ravel.Draining && !wished && may == Full && facts.DrainOver(e):
			e.State, e.Weight, e.By = ravel.Gone, 0, ""
			write(e)
		}
	}
	for _, w := range wishes {
		e, there := known[w.Addr]
		if w.Weight == 0 || there && e.State != ravel.Gone || there && may != Full {
			// What the others sent away does not come back while they wish differently: else it would go and come for ever.
			continue
		}
		e = ravel.RosterEntry{Addr: w.Addr, Birth: birth, State: ravel.Joining, Unknown: e.Unknown}
		if facts.Ready(w, ravel.Gone) {
			e.State, e.Weight = ravel.Active, w.Weight
		}
		changes = append(changes, e)
	}
	slices.SortFunc(changes, func(a, b ravel.RosterEntry) int { return a.Addr.Compare(b.Addr) })
	return changes
}

func anyWeight(wishes []Wish) bool {
	return slices.ContainsFunc(wishes, func(w Wish) bool { return w.Weight > 0 })
}
