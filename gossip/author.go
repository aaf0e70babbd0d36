package gossip

import (
	"time"

	"github.com/ravel-lb/ravel"
)

// Report says of this process what it says of itself, all of it; only what differs from the last time travels. Before
// the first call this process says nothing, and what an earlier life of it said stays in force. The maps are not to be
// changed afterwards. Addresses and VIPs are to be IPv4 or IPv6 without a zone, save those of routers.
func (g *Gossip) Report(r ravel.Report) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.report = &r
	g.view.self(r)
	g.changed = true
	g.soonLocked()
	switch {
	case !g.published:
		if g.settle.heard {
			g.reviveLocked(0)
		}
	case g.crowdedLocked():
		g.reviveLocked(0)
	default:
		g.differLocked(g.valuesLocked())
	}
}

// differLocked says what differs from what was said.
func (g *Gossip) differLocked(values map[cellName]string) {
	for n := range g.said {
		if _, ok := values[n]; !ok {
			g.sayLocked(n, "")
		}
	}
	for n := range g.unsaid {
		if _, ok := values[n]; !ok {
			delete(g.unsaid, n)
		}
	}
	for n, v := range values {
		if g.said[n] != v {
			g.sayLocked(n, v)
		}
	}
}

// sayLocked makes a cell of ours say something; an empty value takes it back. What is refused is tried again.
func (g *Gossip) sayLocked(n cellName, value string) {
	g.version++
	a := g.store.author(g.config.Name)
	o := g.writeLocked(newCell(key{n.topic, g.config.Name, n.name}, rank{a.incarnation, g.version}, value, ""))
	switch {
	case o.refused():
		g.unsaid[n] = o
		return
	case value == "":
		delete(g.said, n)
	default:
		g.said[n] = value
	}
	delete(g.unsaid, n)
}

// resayLocked tries again to say what was refused.
func (g *Gossip) resayLocked() {
	if len(g.unsaid) > 0 && g.published {
		g.differLocked(g.valuesLocked())
	}
}

// crowdedLocked reports whether our tombstones outnumber what we say: then a new life is cheaper.
func (g *Gossip) crowdedLocked() bool {
	a := g.store.author(g.config.Name)
	return a.tombstones > 256 && a.tombstones > 2*len(g.said)
}

// reviveLocked begins a new life, above all that is known of earlier ones and above least, and says everything anew.
func (g *Gossip) reviveLocked(least uint64) {
	if g.report == nil {
		return
	}
	a := g.store.author(g.config.Name)
	incarnation := max(a.incarnation, least) + 1
	g.store.drop(a)
	a.incarnation = incarnation
	g.published = true
	g.said = map[cellName]string{}
	clear(g.unsaid)
	for n, v := range g.valuesLocked() {
		g.sayLocked(n, v)
	}
}

// valuesLocked is all that our cells are to say.
func (g *Gossip) valuesLocked() map[cellName]string {
	values := reportValues(*g.report)
	values[cellName{lifeTopic(g.config.Role), ""}] = lifeValue(g.phase)
	return values
}

// mineLocked takes in a cell of ours that somebody sent. Nobody but us raises them: one that we did not write, and
// that is not below what we say, is of an earlier life, so we begin a new one.
func (g *Gossip) mineLocked(c *cell) outcome {
	if !g.published {
		return g.store.merge(c)
	}
	a := g.store.author(g.config.Name)
	if c.hi < a.incarnation {
		return stale
	}
	if c.hi == a.incarnation {
		if ours := g.store.cells[c.key]; ours != nil && ours.rank.compare(c.rank) >= 0 {
			if ours.compare(c) == 0 {
				return same
			}
			if ours.rank != c.rank {
				return stale
			}
		}
	}
	if above(c.hi, a.incarnation) > wild {
		return tooWild
	}
	g.revival.least = max(g.revival.least, c.hi)
	g.riseLocked(time.Now())
	return stale
}

// revival is a new life of ours that is due. Where another process has our name, two could go on outbidding one another
// without an end; so the second new life within a minute waits a little, and each more twice as long.
type revival struct {
	least uint64 // 0 if none is due
	next  time.Time
	wait  time.Duration
}

const (
	firstRevival = 200 * time.Millisecond
	lastRevival  = time.Minute
)

// riseLocked begins the new life that is due, if it is time for it.
func (g *Gossip) riseLocked(now time.Time) {
	r := &g.revival
	if r.least == 0 || now.Before(r.next) {
		return
	}
	if now.Sub(r.next) > lastRevival {
		r.wait = 0
	}
	r.wait = min(max(firstRevival, 2*r.wait), lastRevival)
	r.next = now.Add(r.wait)
	g.log.Info("this process lived before: beginning above that", "incarnation", r.least+1)
	g.reviveLocked(r.least)
	r.least = 0
}
