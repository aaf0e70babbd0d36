package gossip

import "github.com/ravel-lb/ravel"

// concerns reports whether a cell concerns a member: a pure function of the member, the key, and what the member's own
// redirect cells say. Directors share all but Uses, which only their author needs; a realserver gets the registers, that
// its directors live, what directors use of its addresses, and the rosters and reports of services that it has a
// redirect of. An author's own cells always concern it.
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
		for _, a := range m.addrs {
			if addrName(a) == k.name {
				return true
			}
		}
	case topicService, topicRoster:
		return s.holds(m.name, serviceOf(k))
	}
	return false
}

// spreadLocked has a cell sent to all live members that it concerns.
func (g *Gossip) spreadLocked(k key) {
	send := func(m *member) {
		if m != nil && m.name != g.config.Name && m.live() && g.store.concerns(m, k) {
			g.pendLocked(m, k, 0)
		}
	}
	switch {
	case k.topic == topicUses:
		if a, ok := parseAddr(k.name); ok {
			for _, m := range g.byAddr[a] {
				send(m)
			}
		}
	case (k.topic == topicService || k.topic == topicRoster):
		for name := range g.store.holders[serviceOf(k)] {
			send(g.members[name])
		}
		for _, m := range g.directors {
			send(m)
		}
	case k.topic == topicRegister || k.topic == topicDirector:
		for _, m := range g.members {
			send(m)
		}
	default:
		for _, m := range g.directors {
			send(m)
		}
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
	services := make([]string, 0, 16)
	if a := s.authors[real.name]; a != nil && a.present {
		for _, c := range a.cells {
			add(c)
			if c.topic == topicRedirect && c.value != "" {
				services = append(services, c.name)
			}
		}
	}
	for _, b := range s.fleet[bucketName(key{topic: topicRegister})].all() {
		add(b)
	}
	for _, name := range services {
		// Real servers that are gone are forgotten by each member in its own time.
		for _, c := range s.fleet[bucketName(key{topic: topicRoster, name: name})].all() {
			if !gone(c) {
				add(c)
			}
		}
	}
	for name, d := range g.directors {
		if a := s.authors[name]; a == nil || !a.present || d.name == real.name {
			continue
		}
		add(s.cells[key{topicDirector, name, ""}])
		for _, service := range services {
			add(s.cells[key{topicService, name, service}])
		}
	}
	for _, a := range real.addrs {
		add(s.cells[key{topicUses, director.name, addrName(a)}])
	}
	return newList(all)
}

func (b *bucket) all() map[key]*cell {
	if b == nil {
		return nil
	}
	return b.cells
}
