package gossip

import (
	"net/netip"
	"time"
)

// settling is how far a starting process is with hearing from the others.
type settling struct {
	since     time.Time
	timing    timing
	told      bool             // there are seeds in the settings, or SetSeeds was called
	asked     int              // how often SetSeeds was called
	begun     time.Time        // when the present seeds were first tried
	resolving bool             // the addresses of some of them are not known yet
	seeds     bool             // there are any, save ourselves
	addrs     []netip.AddrPort // theirs
	heard     bool             // one member has told all that it knows, or none is there to tell: we may speak
	settled   bool
}

// tryFor is how long those that do not answer are waited for once somebody did: they may know another fleet.
const tryFor = 500 * time.Millisecond

func (s *settling) begin(now time.Time, t timing) { s.since, s.timing = now, t }

// roundLocked notes that a part of an exchange is done. While we settle the next one follows at once.
func (g *Gossip) roundLocked(from *member) {
	more := from.more
	from.more = false
	if g.settle.settled || from.synced {
		return
	}
	if !more { // what did not fit is still to come
		from.rounds++
	}
	if from.rounds >= 4 {
		// News keep coming, so that we are never the same; but all that was known when we came is here.
		g.heardLocked(from)
		return
	}
	g.syncLocked(from, flushDelay)
}

// heardLocked notes that we hold all that a member knew.
func (g *Gossip) heardLocked(from *member) {
	if from == nil {
		return
	}
	from.synced = true
	g.speakLocked()
}

// speakLocked begins to say what we were told to report: now we know how high our earlier lives were.
func (g *Gossip) speakLocked() {
	if g.settle.heard {
		return
	}
	g.settle.heard = true
	if !g.published {
		g.reviveLocked(0)
	}
}

// trySettle looks whether we have heard from everybody, asks the next one if not, and reports whether we have.
func (g *Gossip) trySettle(now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := &g.settle
	if s.settled {
		return true
	}
	missing, busy := 0, false
	var next *member // one after the other: what the first one told need not be told again
	for _, m := range g.directors {
		if m.name == g.config.Name || !m.live() {
			continue
		}
		if !m.synced {
			missing++
			busy = busy || now.Sub(m.asked) < 300*time.Millisecond
			if next == nil || m.asked.Before(next.asked) {
				next = m
			}
		}
	}
	if next != nil && !busy {
		g.syncLocked(next, 0)
	}
	others := 0
	for _, m := range g.members {
		if m.name != g.config.Name && m.live() {
			others++
		}
	}
	tried := !s.begun.IsZero() && !s.resolving
	for _, a := range s.addrs {
		_, trying := g.trying[a]
		tried = tried && !trying
	}
	tried = tried || !s.begun.IsZero() && now.Sub(s.begun) > tryFor && others > 0
	switch {
	case s.told && tried && missing == 0 && (others > 0 || !s.seeds):
	case now.Sub(s.since) < g.config.Settle:
		return false
	case others > 0:
		g.log.Warn("not all directors were heard in time", "missing", missing, "waited", g.config.Settle)
	default:
		g.log.Warn("no seed answered in time", "waited", g.config.Settle)
	}
	s.settled, g.store.trusting = true, false
	g.log.Info("settled", "members", len(g.members), "after", now.Sub(s.since))
	g.speakLocked()
	g.changed = true
	g.soonLocked()
	return true
}
