package gossip

import (
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/ravel-lb/ravel"
)

// An exchange finds what two members hold differently of what concerns both, and sends only that. Each message is
// answered out of what its reader holds then, so one that is lost, late or doubled does no harm:
//
//	A → B  summary   the sum of all
//	B → A  same, or digest: sums of 64 parts, or for a few cells their hashes
//	A → B  digest: of the parts that differ, and so on
//	B → A  digest: the hashes of cells in a part
//	A → B  delta: what B lacks; digest: what A wants
//	B → A  delta: that

// fewCells are told by their hashes at once.
const fewCells = 48

// syncLocked has an exchange begun with a member after a while.
func (g *Gossip) syncLocked(m *member, after time.Duration) {
	at := time.Now().Add(after)
	if was, ok := g.toSync[m.name]; ok && was.Before(at) {
		return
	}
	g.toSync[m.name] = at
	g.dueLocked(at)
}

// anyLocked picks a live member of a role at random, other than us.
func (g *Gossip) anyLocked(role ravel.Role) *member {
	from := g.members
	if role == ravel.Director {
		from = g.directors
	}
	var picked *member
	n := 0
	for _, m := range from {
		if m.role == role && m.live() && m.name != g.config.Name {
			if n++; rand.IntN(n) == 0 {
				picked = m
			}
		}
	}
	return picked
}

// tick does what is to be done about once a second.
func (g *Gossip) tick(now time.Time) []outgoing {
	g.mu.Lock()
	defer g.mu.Unlock()
	if now.Sub(g.sweptAt) >= time.Duration(len(g.members))*5*time.Millisecond {
		g.sweptAt = now
		g.sweepLocked(now)
	}
	g.reloadLocked()
	g.riseLocked(now)
	g.resayLocked()
	if g.changed {
		g.soonLocked()
	}
	out := g.greetLocked(now)
	// Directors mostly with directors; realservers begin by themselves.
	with := ravel.Director
	if g.config.Role == ravel.Director && rand.IntN(8) == 0 {
		with = ravel.Realserver
	}
	m := g.anyLocked(with)
	if m == nil && g.config.Role == ravel.Director {
		m = g.anyLocked(ravel.Realserver)
	}
	if m == nil {
		return out
	}
	return append(out, g.summaryLocked(m, now))
}

func (g *Gossip) summaryLocked(m *member, now time.Time) outgoing {
	m.asked = now
	return g.toLocked(m, summaryKind, appendFixed(appendFixed(nil, 1, g.commonLocked(m).sum()), 2, g.membersSumLocked()))
}

// handle reads a message and returns the answers.
func (g *Gossip) handle(b []byte) []outgoing {
	e, ok := open(b)
	switch {
	case !ok:
		g.metrics.drop("malformed")
		return nil
	case e.version > wireVersion:
		g.metrics.drop("version")
		return nil
	case e.sender == g.config.Name:
		g.metrics.drop("name")
		return nil
	}
	g.metrics.received(e.kind, len(b))
	g.mu.Lock()
	defer g.mu.Unlock()
	from := g.members[e.sender] // nil if memberlist does not know it yet: what it says counts, answers cannot go
	if from != nil && e.from.IsValid() && e.from != from.addr {
		g.metrics.drop("name")
		return nil
	}
	if from == nil || !from.live() {
		g.strangerLocked(e.from)
	}
	if from != nil && !from.suspect.IsZero() {
		from.suspect = time.Time{}
		g.changed, g.others = true, true
		g.soonLocked()
	}
	switch e.kind {
	case deltaKind:
		if d, ok := parseDelta(e.body); ok {
			return g.mergeLocked(from, d)
		}
	case ackKind:
		if seq, _, ok := parseSums(e.body); ok {
			if from != nil {
				from.landedLocked(seq)
			}
			return nil
		}
	case summaryKind:
		if sum, members, ok := parseSums(e.body); ok {
			g.compareMembersLocked(from, members)
			return g.compareLocked(from, sum)
		}
	case sameKind:
		if _, members, ok := parseSums(e.body); ok {
			g.compareMembersLocked(from, members)
			g.heardLocked(from)
			return nil
		}
	case digestKind:
		if d, ok := parseDigest(e.body); ok {
			return g.digestLocked(from, d)
		}
	case helloKind:
		if from != nil && (from.director() || g.config.Role == ravel.Director) {
			g.syncLocked(from, 0)
		}
		return nil
	default:
		g.metrics.drop("kind")
		return nil
	}
	g.metrics.drop("malformed")
	return nil
}

// mergeLocked takes in cells. Whoever sends what is older than ours gets ours.
func (g *Gossip) mergeLocked(from *member, d delta) []outgoing {
	for range d.bad {
		g.metrics.drop("malformed")
	}
	newer, given := gift{room: maxAnswer}, map[*cell]bool{}
	me := g.members[g.config.Name]
	for _, c := range d.cells {
		// Rosters are the directors' to write.
		forged := c.topic == topicRoster && c.author == "" && from != nil && !from.director()
		if me == nil || forged || !g.store.concerns(me, c.key) {
			g.metrics.drop("unconcerned")
			continue
		}
		var o outcome
		switch {
		case c.author == g.config.Name:
			o = g.mineLocked(c)
		default:
			o = g.store.merge(c)
		}
		switch o {
		case taken:
			g.changed = true
			if c.topic == topicDirector || c.topic == topicRealserver {
				if m := g.members[c.author]; m != nil {
					m.spoken = parseLife(c.value)
					g.others = true
				}
			}
		case stale, buried:
			g.metrics.drop(outcomes[o])
			if ours := g.newerLocked(c); ours != nil && !given[ours] && from != nil && g.store.concerns(from, ours.key) {
				given[ours] = true
				newer.add(ours)
			}
		case tooWild, tooBig, full:
			g.metrics.drop(outcomes[o])
		}
	}
	if g.changed {
		g.soonLocked()
	}
	if from == nil || !from.live() {
		return nil
	}
	var out []outgoing
	if d.seq != 0 {
		out = append(out, g.toLocked(from, ackKind, appendFixed(nil, 1, d.seq)))
	}
	if d.more {
		g.toldMoreLocked(from)
	}
	if d.answer {
		g.roundLocked(from)
	}
	return g.cellsLocked(out, from, newer, false)
}

// newerLocked is what shows the sender of an older cell that it is older: our cell of the key, the one that we forgot,
// or any of the author's newest life.
func (g *Gossip) newerLocked(older *cell) *cell {
	if c := g.store.cells[older.key]; c != nil {
		return c
	}
	if b := g.store.graves[older.key]; b.cell != nil {
		if b.cell.compare(older) > 0 {
			return b.cell
		}
		return nil
	}
	if a := g.store.authors[older.author]; a != nil {
		for _, c := range a.cells {
			return c
		}
	}
	return nil
}

// compareLocked answers a summary.
func (g *Gossip) compareLocked(from *member, sum uint64) []outgoing {
	if from == nil || !from.live() {
		g.metrics.drop("stranger")
		return nil
	}
	set := g.commonLocked(from)
	if set.sum() == sum {
		g.metrics.exchanges.WithLabelValues("same").Inc()
		return []outgoing{g.toLocked(from, sameKind, appendFixed(nil, 2, g.membersSumLocked()))}
	}
	g.metrics.exchanges.WithLabelValues("differ").Inc()
	d := digest{room: maxDigest}
	describe(set, span{}, &d)
	return []outgoing{g.toLocked(from, digestKind, marshalDigest(d))}
}

// describe adds to a digest what a set holds in a span: the hashes of a few cells, or sums.
func describe(set cellSet, s span, d *digest) {
	sums, n := [fanout]uint64{}, 0
	if s.depth < maxDepth {
		var counts [fanout]int
		sums, counts = set.children(s)
		for _, c := range counts {
			n += c
		}
	}
	if s.depth < maxDepth && n > fewCells {
		d.node(node{s, sums[:]})
		return
	}
	l := leaf{span: s}
	set.each(s, func(c *cell) { l.hashes = append(l.hashes, c.hash) })
	d.leaf(l)
}

// digestLocked answers a digest. What does not fit is left to the next exchange, which follows soon; each begins
// elsewhere, so that all gets its turn.
func (g *Gossip) digestLocked(from *member, d digest) []outgoing {
	if from == nil || !from.live() {
		g.metrics.drop("stranger")
		return nil
	}
	now := time.Now()
	if now.Sub(from.givenSince) >= time.Second {
		from.givenSince, from.given = now, 0
	}
	if from.given >= maxGiven {
		g.metrics.drop("busy")
		return nil
	}
	set := g.commonLocked(from)
	reply := digest{room: maxDigest}
	give := gift{room: maxAnswer}
	for n := range elsewhere(d.nodes) {
		sums, counts := set.children(n.span)
		first := rand.IntN(fanout)
		for i := range fanout {
			i = (first + i) % fanout
			child := n.child(i)
			switch {
			case sums[i] == n.sums[i]:
			case n.sums[i] == 0: // it has none there
				give.all(set, child)
			case counts[i] == 0:
				reply.leaf(leaf{span: child})
			default:
				describe(set, child, &reply)
			}
		}
	}
	for l := range elsewhere(d.leaves) {
		theirs := l.set()
		set.each(l.span, func(c *cell) {
			if _, ok := theirs[c.hash]; !ok {
				give.add(c)
			}
			delete(theirs, c.hash)
		})
		if len(theirs) > 0 {
			reply.want(leaf{l.span, slices.Collect(maps.Keys(theirs))})
		}
	}
	wanted := gift{room: give.room}
	for l := range elsewhere(d.wants) {
		want := l.set()
		set.each(l.span, func(c *cell) {
			if _, ok := want[c.hash]; ok {
				wanted.add(c)
			}
		})
	}
	from.given += maxAnswer - wanted.room
	cut := reply.more || give.more || wanted.more
	if cut {
		g.moreLocked(from)
	}
	if d.more {
		g.toldMoreLocked(from)
	}
	var out []outgoing
	out = g.cellsLocked(out, from, give, false)
	if len(d.wants) > 0 {
		out = g.cellsLocked(out, from, wanted, true)
	}
	if !reply.empty() {
		reply.more = cut
		return append(out, g.toLocked(from, digestKind, marshalDigest(reply)))
	}
	g.roundLocked(from)
	return out
}

// The bytes that one message makes us send, and one member in a second.
const (
	maxDigest = 256 << 10
	maxAnswer = 1 << 20
	maxGiven  = 8 << 20
)

// gift is cells to send, as many as there is room for.
type gift struct {
	cells []*cell
	room  int  // bytes
	more  bool // there was not room for all
}

func (f *gift) add(c *cell) {
	n := len(c.author) + len(c.name) + len(c.value) + len(c.unknown) + 40
	if f.room < n {
		f.more = true
		return
	}
	f.room -= n
	f.cells = append(f.cells, c)
}

func (f *gift) all(set cellSet, s span) {
	if f.more {
		return
	}
	set.each(s, f.add)
}

// elsewhere yields all of a slice, from a random one on.
func elsewhere[T any](all []T) iter.Seq[T] {
	return func(yield func(T) bool) {
		if len(all) == 0 {
			return
		}
		first := rand.IntN(len(all))
		for i := range all {
			if !yield(all[(first+i)%len(all)]) {
				return
			}
		}
	}
}

// moreLocked notes that an exchange with a member was cut short by us: the next one follows soon.
func (g *Gossip) moreLocked(m *member) {
	m.more = true
	g.syncLocked(m, 5*flushDelay)
}

// toldMoreLocked notes that it was cut short by the member, who begins the next one. While we settle we do not wait for
// it.
func (g *Gossip) toldMoreLocked(m *member) {
	m.more = true
	if !g.settle.settled {
		g.syncLocked(m, flushDelay)
	}
}
