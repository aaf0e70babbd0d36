package gossip

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/ravel-lb/ravel"
)

const (
	maxStreams  = 8       // that are sent at once to members of a role
	maxQueued   = 4 << 20 // bytes that wait for their turn to go to one member
	firstPause  = time.Second
	lastPause   = 30 * time.Second
	greetAfter  = time.Minute
	tellOfPause = 5 * time.Minute // how long a member that takes no streams is a problem after the last try
)

var errBusy = errors.New("others that took no streams are tried first")

// streams are what goes to one member by TCP: one at a time, so that a member that takes none holds up no other.
type streams struct {
	queue  []outgoing
	bytes  int
	busy   bool      // one is on its way, or waits for its turn
	failed int       // in a row
	last   time.Time // when one failed
	until  time.Time // none is tried before
}

func (s *streams) paused(now time.Time) bool { return now.Before(s.until) }

// tokens limit how many streams are sent at once: for directors, for realservers, and for those that took none the last
// time; these do not wait for one.
type tokens struct{ directors, realservers, doubtful chan struct{} }

func newTokens() tokens {
	return tokens{make(chan struct{}, maxStreams), make(chan struct{}, maxStreams), make(chan struct{}, maxStreams/4)}
}

// take waits for a token, or reports that there is none.
func (t tokens) take(director, doubtful bool) (back func(), ok bool) {
	from := t.realservers
	switch {
	case doubtful:
		select {
		case t.doubtful <- struct{}{}:
			return func() { <-t.doubtful }, true
		default:
			return nil, false
		}
	case director:
		from = t.directors
	}
	from <- struct{}{}
	return func() { <-from }, true
}

// stream has a message sent by TCP in its turn. When too much waits for a member, or it took nothing lately, it is lost,
// as a packet may be.
func (g *Gossip) stream(list *memberlist.Memberlist, o outgoing) {
	g.mu.Lock()
	defer g.mu.Unlock()
	m := g.members[o.node.Name]
	if m == nil || m.streams.paused(time.Now()) || m.streams.bytes+len(o.b) > maxQueued {
		g.metrics.drop("streams")
		return
	}
	s := &m.streams
	s.queue = append(s.queue, o)
	s.bytes += len(o.b)
	if !s.busy {
		s.busy = true
		g.sending.Go(func() { g.streamAll(list, m) })
	}
}

// streamAll sends what waits for a member.
func (g *Gossip) streamAll(list *memberlist.Memberlist, m *member) {
	s := &m.streams
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(s.queue) > 0 {
		o, director, doubtful := s.queue[0], m.director(), s.failed > 0
		s.queue = s.queue[1:]
		s.bytes -= len(o.b)
		g.mu.Unlock()
		err := errBusy
		if back, ok := g.tokens.take(director, doubtful); ok {
			g.metrics.sent(o.kind, len(o.b))
			err = list.SendReliable(&o.node, o.b)
			back()
		}
		g.mu.Lock()
		if err == nil {
			s.failed, s.until = 0, time.Time{}
			continue
		}
		g.log.Debug("sending a stream", "member", m.name, "err", err)
		now := time.Now()
		if errors.Is(err, errBusy) {
			s.until = now.Add(firstPause)
		} else {
			s.until, s.last = now.Add(min(firstPause<<min(s.failed, 10), lastPause)), now
			s.failed++
		}
		for range s.queue {
			g.metrics.drop("streams")
		}
		s.queue, s.bytes = nil, 0
	}
	s.queue, s.busy = nil, false
	g.soonLocked() // what was not acknowledged may be due
}

// greetLocked is a greeting by TCP to a member that took no stream for a while: so it is known when it does again.
func (g *Gossip) greetLocked(now time.Time) []outgoing {
	for _, m := range g.members {
		if m.live() && m.streams.failed > 0 && !m.streams.busy && now.Sub(m.streams.last) > greetAfter {
			return []outgoing{g.toLocked(m, helloKind, nil)}
		}
	}
	return nil
}

// streamProblemsLocked tells of members that take no streams.
func (g *Gossip) streamProblemsLocked(now time.Time) []ravel.Problem {
	var deaf []string
	for _, m := range g.members {
		if m.live() && m.streams.failed > 0 && now.Sub(m.streams.last) < tellOfPause {
			deaf = append(deaf, m.name)
		}
	}
	if len(deaf) == 0 {
		return nil
	}
	slices.Sort(deaf)
	who := strings.Join(deaf[:min(len(deaf), 5)], ", ")
	if len(deaf) > 5 {
		who += fmt.Sprintf(" and %d others", len(deaf)-5)
	}
	return []ravel.Problem{{
		Where: "gossip",
		What:  fmt.Sprintf("TCP to %s does not get through; what is long reaches it late or not at all", who),
		Fix:   fmt.Sprintf("let UDP and TCP to port %d through between all members", g.config.Bind.Port()),
	}}
}
