package director

import "net/netip"

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

// step is one netlink request about a real server.
type step struct {
	op   operation
	real real // with what it should have after the step
	// takes says that the step takes a real server from new flows: it is done only while another one is left.
	takes bool
}

// plan returns what turns one list of real servers into another, in an order in which nothing is taken away before all
// is there that replaces it. None changes its place, except one that should own no slot any more: that takes a removal.
func plan(have, want []real) []step {
	var gives, takes []step
	at := make(map[netip.AddrPort]real, len(have))
	for _, h := range have {
		at[h.at] = h
	}
	// The kernel puts a new one at the head.
	for i := len(want) - 1; i >= 0; i-- {
		w := want[i]
		h, there := at[w.at]
		delete(at, w.at)
		switch {
		case !there:
			gives = append(gives, arrive(w)...)
		case h.weight == w.weight && h.method == w.method && h.limited == w.limited && !h.forgets(w):
		case w.weight > 0 && w.weight >= h.weight:
			gives = append(gives, step{op: editReal, real: w})
		case w.weight > 0:
			takes = append(takes, step{op: editReal, real: w})
		case w.last == 0 && h.forgets(w):
			takes = append(takes, step{op: delReal, real: w, takes: true}, step{op: addReal, real: w})
		default:
			takes = append(takes, quiesce(h, w)...)
		}
	}
	for _, h := range have {
		if _, left := at[h.at]; left {
			takes = append(takes, step{op: delReal, real: h, takes: true})
		}
	}
	return append(gives, takes...)
}

// forgets reports whether a real server has another last weight than w wants.
func (r real) forgets(w real) bool { return w.last != unknown && r.last != w.last }

// arrive adds a real server. One with weight 0 gets its last weight first, which is what it owns slots by.
func arrive(w real) []step {
	first := w
	first.weight = max(w.weight, w.last)
	steps := []step{{op: addReal, real: first}}
	if w.weight != first.weight {
		steps = append(steps, step{op: editReal, real: w})
	}
	return steps
}

// quiesce gives a real server weight 0, after another last weight if it has another.
func quiesce(h, w real) []step {
	end := step{op: editReal, real: w, takes: true}
	if !h.forgets(w) {
		return []step{end}
	}
	first := w
	first.weight = w.last
	return []step{{op: editReal, real: first}, end}
}
