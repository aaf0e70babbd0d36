package director

import (
	"net/netip"

	"github.com/ravel-lb/ravel"
)

// operation is one kind of netlink request, by its name in metrics.
type operation string

const (
	addService  operation = "add-service"
	editService operation = "edit-service"
	delService  operation = "delete-service"
	addReal     operation = "add-real-server"
	editReal    operation = "edit-real-server"
	delReal     operation = "delete-real-server"
)

// step is one netlink request about a real server, or two where it is taken out to be added again.
type step struct {
	op   operation
	real real // with what it should have after the step
	// again says, of an addReal, that the real server is in the list and is removed right before: the only way to
	// another place, and to own no slot any more.
	again bool
	// takes says that the step takes a real server from new flows: it is done only while another one is left.
	takes bool
	// held says that new flows must wait meanwhile: they would go where they must not, or find nobody.
	held bool
}

// plan returns what turns one list of real servers into another, in an order in which nothing is taken away before all
// is there that replaces it.
//
// The kernel puts a new one at the head of its list. So what can stay is a tail of the wanted list that has the same
// order in the kernel's; the longest one does. All before it is added, or added again, oldest first. To schedulers other
// than mh the order means nothing, and none is added again.
func plan(have, want service) []step {
	index := make(map[netip.AddrPort]int, len(have.reals))
	for i, h := range have.reals {
		index[h.at] = i
	}
	stay := stays(have.reals, want, index)
	var gives, adds, holds, takes []step
	for i := len(want.reals) - 1; i >= 0; i-- {
		w := want.reals[i]
		at, there := index[w.at]
		switch {
		case !there:
			adds = append(adds, arrive(w)...)
			continue
		case i < stay && want.ordered():
			add, later := readd(have.reals[at], w)
			adds, takes = append(adds, add...), append(takes, later...)
			continue
		}
		h := have.reals[at]
		switch {
		case h.weight == w.weight && h.method == w.method && h.upper == w.upper && h.lower == w.lower && !h.forgets(w):
		case w.weight > 0 && w.weight >= h.weight:
			gives = append(gives, step{op: editReal, real: w})
		case w.weight > 0 || !h.forgets(w):
			takes = append(takes, step{op: editReal, real: w, takes: w.weight == 0})
		case h.weight > 0:
			takes = append(takes, assert(w, false)...)
		default:
			holds = append(holds, assert(w, true)...)
		}
	}
	gives = append(gives, bridge(have.reals, want.reals, gives, adds)...)
	added := make(map[netip.AddrPort]bool, len(gives))
	for _, g := range gives {
		added[g.real.at] = g.op == addReal
	}
	for i, s := range adds {
		if s.op == addReal && added[s.real.at] {
			adds[i].again = true
		}
	}
	wanted := make(map[netip.AddrPort]bool, len(want.reals))
	for _, w := range want.reals {
		wanted[w.at] = true
	}
	for _, h := range have.reals {
		if !wanted[h.at] {
			takes = append(takes, step{op: delReal, real: h, takes: true})
		}
	}
	steps := append(append(append(gives, adds...), holds...), takes...)
	gaps(have.reals, steps)
	return steps
}

// stays returns the place in the wanted list from which on all can stay where they are in the kernel's.
func stays(have []real, want service, index map[netip.AddrPort]int) int {
	if !want.ordered() {
		return 0
	}
	before := len(have)
	for i := len(want.reals) - 1; i >= 0; i-- {
		w := want.reals[i]
		at, there := index[w.at]
		if !there || at >= before || w.weight == 0 && w.last == 0 && have[at].forgets(w) {
			return i + 1
		}
		before = at
	}
	return 0
}

// ordered reports whether the scheduler reads the order of the list.
func (s service) ordered() bool { return s.scheduler == string(ravel.MH) }

// forgets reports whether a real server has another last weight than w wants.
func (r real) forgets(w real) bool { return w.last != unknown && r.last != w.last }

// arrive adds a real server. One with weight 0 gets its last weight first, which is what it owns slots by.
func arrive(w real) []step {
	if w.weight > 0 || w.last <= 0 {
		return []step{{op: addReal, real: w}}
	}
	first := w
	first.weight = w.last
	return []step{{op: addReal, real: first, held: true}, {op: editReal, real: w, held: true}}
}

// readd takes a real server out and adds it again. If it takes new flows and shall not, it does so until later, for
// what replaces it may not be there yet; unless it shall own no slot, which only an add with weight 0 can do.
func readd(h, w real) (add, later []step) {
	add = arrive(w)
	add[0].again = true
	switch {
	case h.weight == 0 || w.weight > 0:
	case len(add) == 1:
		add[0].takes = true
	default:
		later = add[1:]
		later[0].takes, later[0].held = true, false
		add = add[:1:1]
		add[0].held = false
	}
	return add, later
}

// assert gives a real server a last weight and then weight 0.
func assert(w real, held bool) []step {
	first := w
	first.weight = w.last
	return []step{{op: editReal, real: first, held: held}, {op: editReal, real: w, held: held, takes: !held}}
}

// bridge looks for a moment in which nobody would take new flows while the order is mended, and returns the step that
// has somebody take them before: the newest that has no weight yet is given one.
func bridge(have, want []real, gives, adds []step) []step {
	weights := newWeights(have)
	for _, s := range gives {
		weights.do(s)
	}
	for n, s := range adds {
		if !weights.alone(s) {
			weights.do(s)
			continue
		}
		for _, w := range want {
			if w.weight == 0 || weights.of[w.at] > 0 {
				continue
			}
			for _, later := range adds[n+1:] {
				if later.real.at == w.at && later.op == addReal {
					op := addReal
					if later.again {
						op = editReal
					}
					return []step{{op: op, real: w}}
				}
			}
		}
		return nil
	}
	return nil
}

// gaps has new flows wait where the only one that takes them is added again.
func gaps(have []real, steps []step) {
	weights := newWeights(have)
	for i, s := range steps {
		if weights.alone(s) && s.op == addReal {
			steps[i].held = true
		}
		weights.do(s)
	}
}

// weights are those of real servers while steps are done, of those that take new flows.
type weights struct {
	of map[netip.AddrPort]int // of those that have one
}

func newWeights(reals []real) weights {
	w := weights{map[netip.AddrPort]int{}}
	for _, r := range reals {
		w.set(r.at, r.weight)
	}
	return w
}

func (w weights) set(at netip.AddrPort, weight int) {
	if weight > 0 {
		w.of[at] = weight
	} else {
		delete(w.of, at)
	}
}

func (w weights) do(s step) {
	if s.op == delReal || s.held {
		delete(w.of, s.real.at)
	} else {
		w.set(s.real.at, s.real.weight)
	}
}

// alone reports whether a step takes the only one that takes new flows away, be it for a moment.
func (w weights) alone(s step) bool {
	return len(w.of) == 1 && w.of[s.real.at] > 0 && (s.again || s.op == delReal || s.real.weight == 0)
}
