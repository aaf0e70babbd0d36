package gossip

import (
	"cmp"
	"slices"
)

// span is a part of all cells: those whose spot begins with the 6*depth bits of prefix.
type span struct {
	depth  int
	prefix uint64
}

const (
	fanout   = 64 // children of a span
	fanBits  = 6
	maxDepth = 4 // spans of this depth are not split any more: one in 16 million
)

func (s span) contains(spot uint64) bool {
	return s.depth == 0 || spot>>(64-fanBits*s.depth) == s.prefix
}

func (s span) child(i int) span { return span{s.depth + 1, s.prefix<<fanBits | uint64(i)} }

// childOf is the number of the child that a spot within s belongs to.
func (s span) childOf(spot uint64) int { return int(spot>>(64-fanBits*(s.depth+1))) & (fanout - 1) }

// valid reports whether a span that came from elsewhere is one.
func (s span) valid() bool {
	return s.depth >= 0 && s.depth <= maxDepth && s.prefix>>(fanBits*s.depth) == 0
}

// first is the lowest spot within s, and last the highest.
func (s span) first() uint64 {
	if s.depth == 0 {
		return 0
	}
	return s.prefix << (64 - fanBits*s.depth)
}

func (s span) last() uint64 { return s.first() | (1<<(64-fanBits*s.depth) - 1) }

// disjoint reports whether no two spans overlap; it sorts them.
func disjoint(spans []span) bool {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.first(), b.first()) })
	for i := range len(spans) - 1 {
		if spans[i].last() >= spans[i+1].first() {
			return false
		}
	}
	return true
}

// cellSet is the cells that concern two members, as both know them: what their digests are of.
type cellSet interface {
	// sum is the XOR of the hashes of all.
	sum() uint64
	// each calls f for those of a span.
	each(s span, f func(*cell))
	// children returns the sum and number of those in each child of a span.
	children(s span) (sums [fanout]uint64, counts [fanout]int)
}

// list is a small set, sorted by spot.
type list []*cell

func newList(cells []*cell) list {
	slices.SortFunc(cells, func(a, b *cell) int { return cmp.Compare(a.spot, b.spot) })
	return cells
}

var (
	_ cellSet = list(nil)
	_ cellSet = (*tree)(nil)
)

func (l list) sum() uint64 {
	var sum uint64
	for _, c := range l {
		sum ^= c.hash
	}
	return sum
}

func (l list) each(s span, f func(*cell)) {
	i, _ := slices.BinarySearchFunc(l, s.first(), func(c *cell, spot uint64) int { return cmp.Compare(c.spot, spot) })
	for last := s.last(); i < len(l) && l[i].spot <= last; i++ {
		f(l[i])
	}
}

func (l list) children(s span) (sums [fanout]uint64, counts [fanout]int) {
	l.each(s, func(c *cell) {
		i := s.childOf(c.spot)
		sums[i] ^= c.hash
		counts[i]++
	})
	return sums, counts
}

// tree is a big set whose sums are kept up, so that a digest costs in proportion to what differs.
type tree struct {
	root  uint64
	group [fanout]uint64
	slots [fanout * fanout]slot
	n     [fanout]int
}

type slot struct {
	sum   uint64
	cells []*cell
}

func (t *tree) add(c *cell) {
	s := t.toggle(c)
	s.cells = append(s.cells, c)
	t.n[c.spot>>(64-fanBits)]++
}

func (t *tree) remove(c *cell) {
	s := t.toggle(c)
	for i, d := range s.cells {
		if c == d {
			last := len(s.cells) - 1
			s.cells[i], s.cells[last] = s.cells[last], nil
			s.cells = s.cells[:last]
			break
		}
	}
	t.n[c.spot>>(64-fanBits)]--
}

func (t *tree) toggle(c *cell) *slot {
	t.root ^= c.hash
	t.group[c.spot>>(64-fanBits)] ^= c.hash
	s := &t.slots[c.spot>>(64-2*fanBits)]
	s.sum ^= c.hash
	return s
}

func (t *tree) sum() uint64 { return t.root }

func (t *tree) each(s span, f func(*cell)) {
	lo, hi := 0, len(t.slots)
	switch {
	case s.depth == 1:
		lo = int(s.prefix) * fanout
		hi = lo + fanout
	case s.depth >= 2:
		lo = int(s.prefix >> (fanBits * (s.depth - 2)))
		hi = lo + 1
	}
	for i := lo; i < hi; i++ {
		for _, c := range t.slots[i].cells {
			if s.contains(c.spot) {
				f(c)
			}
		}
	}
}

func (t *tree) children(s span) (sums [fanout]uint64, counts [fanout]int) {
	switch s.depth {
	case 0:
		return t.group, t.n
	case 1:
		for i := range fanout {
			slot := &t.slots[int(s.prefix)*fanout+i]
			sums[i], counts[i] = slot.sum, len(slot.cells)
		}
		return sums, counts
	}
	t.each(s, func(c *cell) {
		i := s.childOf(c.spot)
		sums[i] ^= c.hash
		counts[i]++
	})
	return sums, counts
}
