package gossip

import "time"

// settling is how far a starting process is with hearing from the others.
type settling struct {
	since   time.Time
	timing  timing
	tried   bool // all seeds were tried once
	seeds   bool // there are any, save ourselves
	joined  bool // one answered
	heard   bool // one member has told all that it knows, or none is there to tell: we may speak
	settled bool
}

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
	directors, missing, busy := 0, 0, false
	var next *member // one after the other: what the first one told need not be told again
	for _, m := range g.directors {
		if m.name == g.config.Name || !m.live() {
			continue
		}
		directors++
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
	switch {
	case s.tried && !s.seeds && missing == 0:
	case (s.joined || directors > 0 && s.tried) && missing == 0:
	case now.Sub(s.since) < g.config.Settle:
		return false
	case s.joined || directors > 0:
		g.log.Warn("not all directors were heard in time", "missing", missing, "waited", g.config.Settle)
	default:
		g.log.Warn("no seed answered in time", "waited", g.config.Settle)
	}
	s.settled = true
	g.log.Info("settled", "members", len(g.members), "after", now.Sub(s.since))
	g.speakLocked()
	g.changed = true
	g.soonLocked()
	return true
}
