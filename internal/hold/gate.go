package hold

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
)

// Names of registers of the fleet.
const (
	// AcceptPrefix and the name of documents are "on" while an operator lets them through.
	AcceptPrefix = "accept/"
	// documentPrefix and the name of a director have the name of the documents that it has in force, and behind holds that
	// of those that it holds.
	documentPrefix = "document/"
	holds          = " holds "
)

// Accepted reports whether an operator lets documents of a name through.
func Accepted(fleet ravel.Fleet, name string) bool {
	return name != "" && fleet.Registers[AcceptPrefix+name].Value == "on"
}

// Says returns the names of the documents that a director has in force, and holds; empty is neither.
func Says(fleet ravel.Fleet, director string) (inForce, held string) {
	inForce, held, _ = strings.Cut(fleet.Registers[documentPrefix+director].Value, holds)
	return inForce, held
}

// Options are what a Gate works with.
type Options struct {
	// Share is how much of a kind, in percent, a change may take away; 100 holds nothing.
	Share int
	// Self is the director's name, which tells the others what it has in force; empty on a realserver.
	Self string
	// Fleet and Boot name the fleet and the life of this kernel: what was saved in another is not gone by.
	Fleet, Boot string
	Registerer  prometheus.Registerer // may be nil
}

// Gate decides which documents are in force. It touches nothing. Its methods are for one goroutine.
type Gate struct {
	o      Options
	inner  Documents // in force; zero before known
	name   string    // of inner
	known  bool      // inner counts
	newest Documents
	called string // the name of newest; empty before the first
	held   *Change
	// doubts is the name of documents that others held when this process knew of none.
	doubts string
	asked  string    // the name of documents that others were to say something of, while this process knows of none
	since  time.Time // of asked
	saved  *Saved    // of an earlier process, that may not count
	unkept bool      // what is to be saved changed

	metrics *metrics
}

// New returns a Gate to which no documents came yet.
func New(o Options) *Gate { return &Gate{o: o, metrics: newMetrics(o.Registerer)} }

// Decision is what a process goes by.
type Decision struct {
	InForce Documents
	// Unconfirmed says that InForce are documents that may be held by others, and nothing is known of before: who has no
	// other hold of them must change nothing.
	Unconfirmed bool
	// Held is the change that waits; nil is none.
	Held *Change
	// Newest are the documents as they are.
	Newest Documents
	// Wake is when to decide again though nothing changed; zero is not.
	Wake time.Time
	// Tell are registers of the fleet to be set; it is empty once they are.
	Tell map[string]string
}

// patience is how long who knows of nothing before waits for others to say what they do with the same documents, which may
// reach them later.
const patience = 30 * time.Second

// Decide is given the newest documents and what is known of the fleet.
func (g *Gate) Decide(now time.Time, newest Documents, fleet ravel.Fleet) Decision {
	before := g.called
	again := before != "" && newest.Same(g.newest)
	// Only pods came and went, or nodes changed, that are none of the documents' doing.
	reported := before != "" && newest.Reported && newest.sameWishes(g.newest)
	if !again && !reported {
		g.called = newest.Name()
	}
	g.newest = newest
	tell := map[string]string{}
	for _, past := range []string{before, g.name} {
		// An accept ends with the documents that it was for. Who did not have them yet, still may come to them.
		if past != g.called && Accepted(fleet, past) && (g.o.Self != "" || len(fleet.Live(ravel.Director)) == 0) {
			tell[AcceptPrefix+past] = ""
		}
	}
	if g.saved != nil {
		g.recall(fleet)
	}
	unconfirmed, empty := false, false
	var wake time.Time
	switch {
	case g.known && g.name == g.called, Accepted(fleet, g.called), g.most(fleet, g.called), g.o.Share >= 100:
		g.pass()
	case g.known:
		switch waits := g.held != nil && g.held.Name == g.called; {
		case waits && again:
		case waits && reported:
			if g.inner = g.inner.instead(newest); len(Weigh(g.inner, newest, g.o.Share)) == 0 {
				g.pass() // what it was held for has come, as pods of services that are new
			}
		default:
			g.weigh()
		}
	case !fleet.Settled:
		unconfirmed = true
	default:
		if g.asked != g.called {
			g.asked, g.since = g.called, now
		}
		switch held, had, other := g.others(fleet); {
		case g.doubts == g.called || held > 0 && held >= had:
			g.doubts, unconfirmed = g.called, true
		case had == 0 && len(newest.Cluster.Services) == 0:
			// Nothing wanted, and not known that anything ever was: that is too little to empty a kernel.
			unconfirmed, empty = true, true
		case had == 0 && other > 0 && now.Sub(g.since) < patience:
			unconfirmed, wake = true, g.since.Add(patience)
		default:
			g.pass()
		}
	}
	d := Decision{InForce: g.inner, Unconfirmed: unconfirmed, Held: g.held, Newest: newest, Wake: wake}
	switch {
	case unconfirmed:
		d.InForce, d.Held = newest, nil
		if empty || g.doubts == g.called {
			d.Held = &Change{Name: g.called, Empty: empty}
		}
	case g.o.Self != "" && fleet.Settled:
		says := g.name
		if g.held != nil {
			says += holds + g.called
		}
		if fleet.Registers[documentPrefix+g.o.Self].Value != says {
			tell[documentPrefix+g.o.Self] = says
		}
	}
	d.Tell = tell
	g.metrics.observe(d.Held)
	return d
}

// pass puts the newest documents in force.
func (g *Gate) pass() {
	kept := g.known && g.held == nil && g.inner.sameWishes(g.newest) && (g.newest.Reported || g.inner.Same(g.newest))
	g.unkept = g.unkept || !kept
	g.inner, g.name, g.known, g.held, g.doubts, g.saved = g.newest, g.called, true, nil, "", nil
}

// weigh holds the newest documents, or puts them in force.
func (g *Gate) weigh() {
	parts := Weigh(g.inner, g.newest, g.o.Share)
	if len(parts) == 0 {
		g.pass()
		return
	}
	if g.held == nil || g.held.Name != g.called {
		g.unkept = true
	}
	g.inner = g.inner.instead(g.newest)
	g.held = &Change{Name: g.called, Parts: parts}
}

// most reports whether more than half of the live directors have the documents in force: they may have come to them by
// smaller steps, some of which were not seen here.
func (g *Gate) most(fleet ravel.Fleet, name string) bool {
	if !fleet.Settled {
		return false
	}
	live, have := fleet.Live(ravel.Director), 0
	for _, m := range live {
		if inForce, _ := Says(fleet, m.Name); inForce == name && m.Name != g.o.Self {
			have++
		}
	}
	return 2*have > len(live)
}

// others counts the live directors that hold the newest documents, have them in force, or have only others.
func (g *Gate) others(fleet ravel.Fleet) (held, had, other int) {
	count := func(name string) {
		switch inForce, holds := Says(fleet, name); g.called {
		case holds:
			held++
		case inForce:
			had++
		default:
			if inForce != "" {
				other++
			}
		}
	}
	for _, m := range fleet.Live(ravel.Director) {
		if m.Name != g.o.Self {
			count(m.Name)
		}
	}
	if held+had+other == 0 && g.o.Self != "" {
		count(g.o.Self) // in an earlier life
		other = 0
	}
	return held, had, other
}

// recall takes what an earlier process had in force for that, where it still counts: this kernel may hold it, the same
// change waited for it, others have it in force, or the newest documents take nothing of it away.
func (g *Gate) recall(fleet ravel.Fleet) {
	s := g.saved
	if s.Fleet != g.o.Fleet {
		g.saved = nil
		return
	}
	counts := s.Boot == g.o.Boot && s.Boot != "" || s.Pending == g.called
	if fleet.Settled {
		for _, m := range fleet.Live(ravel.Director) {
			inForce, _ := Says(fleet, m.Name)
			counts = counts || m.Name != g.o.Self && inForce == s.Name
		}
	}
	if counts || len(Weigh(s.Documents, g.newest, g.o.Share)) == 0 {
		g.inner, g.name, g.known, g.saved = s.Documents, s.Name, true, nil
	}
}

// Saved is what a process keeps for a later one.
type Saved struct {
	Fleet   string `json:"fleet"`
	Boot    string `json:"boot"`
	Name    string `json:"name"`              // of the documents in force
	Pending string `json:"pending,omitempty"` // of those that are held
	// Documents are those in force; of what a cluster reports only the endpoints that the held ones do not name.
	Documents Documents `json:"documents"`
}

// Restore is told, before the first Decide, what an earlier process saved.
func (g *Gate) Restore(s Saved) { g.saved = &s }

// Save returns what is to be kept, and whether that changed since Kept.
func (g *Gate) Save() (Saved, bool) {
	if !g.known || !g.unkept {
		return Saved{}, false
	}
	s := Saved{Fleet: g.o.Fleet, Boot: g.o.Boot, Name: g.name, Documents: g.inner}
	if g.held != nil {
		s.Pending = g.held.Name
	}
	if c := &s.Documents.Cluster; s.Documents.Reported {
		c.Nodes, c.Endpoints = nil, nil
		if g.held != nil {
			named := map[pods]bool{}
			for _, v := range g.newest.Cluster.Services {
				named[podsOf(v)] = true
			}
			for _, e := range g.inner.Cluster.Endpoints {
				if !named[endpointOf(e)] {
					c.Endpoints = append(c.Endpoints, e)
				}
			}
		}
	}
	return s, true
}

// Kept is told that what Save returned is kept.
func (g *Gate) Kept() { g.unkept = false }
