package gossip

import (
	"slices"

	"github.com/ravel-lb/ravel"
)

// concerns reports whether a cell concerns a member: a pure function of the member and the key. Directors share all but
// Uses, which only their author needs; a realserver gets the registers, that its directors live, and what directors use
// of its addresses. An author's own cells always concern it.
func (s *store) concerns(m *member, k key) bool {
	switch {
	case k.author == m.name:
		return true
	case m.role == ravel.Director:
		return k.topic != topicUses
	}
	switch k.topic {
	case topicRegister, topicDirector:
		return true
	case topicUses:
		a, _, ok := parseUsesName(k.name)
		return ok && slices.Contains(m.addrs, a)
	}
	return false
}

// spreadLocked has a cell sent to all live members that it concerns.
func (g *Gossip) spreadLocked(k key) {
	send := func(m *member) {
		if m.name != g.config.Name && m.live() && g.store.concerns(m, k) {
			g.pendLocked(m, k, 0)
		}
	}
	to := g.directors
	switch k.topic {
	case topicUses:
		a, _, _ := parseUsesName(k.name)
		to = g.byAddr[a]
	case topicRegister, topicDirector:
		to = g.members
	}
	for _, m := range to {
		send(m)
	}
}

// commonLocked is the set of cells that concern both us and another: all digests between us are of it.
func (g *Gossip) commonLocked(m *member) cellSet {
	me := g.members[g.config.Name]
	if me == nil {
		return list(nil)
	}
	director, real := me, m
	switch {
	case me.director() && m.director():
		return g.store.tree
	case !me.director() && !m.director():
		return list(nil)
	case m.director():
		director, real = m, me
	}
	s := g.store
	var all []*cell
	add := func(c *cell) {
		if c != nil {
			all = append(all, c)
		}
	}
	if a := s.authors[real.name]; a != nil && a.present {
		for _, c := range a.cells {
			add(c)
		}
	}
	for _, b := range s.fleet[bucketName(key{topic: topicRegister})].all() {
		add(b)
	}
	for name := range g.directors {
		if a := s.authors[name]; a != nil && a.present && name != real.name {
			add(s.cells[key{topicDirector, name, ""}])
		}
	}
	for _, a := range real.addrs {
		for part := range usesParts {
			c := s.cells[key{topicUses, director.name, usesName(a, part)}]
			if c == nil {
				break
			}
			add(c)
		}
	}
	return newList(all)
}

func (b *bucket) all() map[key]*cell {
	if b == nil {
		return nil
	}
	return b.cells
}
