package gossip

import (
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	ackWithin = 250 * time.Millisecond // then a delta is sent again
	maxTries  = 4                      // and in the end left to the exchange of digests
)

// outgoing is a message to one member.
type outgoing struct {
	node memberlist.Node
	kind kind
	b    []byte
}

func (g *Gossip) toLocked(m *member, k kind, body []byte) outgoing {
	return outgoing{m.node, k, seal(k, g.config.Name, g.config.Advertise, body)}
}

// pendLocked has a cell sent to a member with the next flush.
func (g *Gossip) pendLocked(m *member, k key, tries int) {
	if m.pending == nil {
		m.pending = map[key]int{}
	}
	m.pending[k] = tries
	g.toSend[m.name] = m
	g.soonLocked()
}

// send sends messages: small ones as packets, others as streams.
func (g *Gossip) send(all []outgoing) {
	list := g.list.Load()
	if list == nil {
		return
	}
	for _, o := range all {
		if len(o.b) > maxPacket || o.kind == helloKind {
			g.stream(list, o)
			continue
		}
		g.metrics.sent(o.kind, len(o.b))
		if err := list.SendBestEffort(&o.node, o.b); err != nil {
			g.log.Debug("sending a packet", "member", o.node.Name, "err", err)
		}
	}
}

// flush makes the messages that are due, and the Fleet if it changed.
func (g *Gossip) flush(now time.Time) []outgoing {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.flushAt.IsZero() {
		return nil
	}
	g.flushAt = time.Time{}
	var out []outgoing
	cache := map[key][]byte{}
	for name, m := range g.toSend {
		delete(g.toSend, name)
		if m.live() && g.members[name] == m {
			out = g.deltasLocked(out, m, cache, now)
		}
	}
	for name, m := range g.flying {
		if g.resendLocked(m, now); len(m.flights) == 0 {
			delete(g.flying, name)
		} else {
			g.dueLocked(later(m.flights[0].sent.Add(ackWithin), now.Add(flushDelay)))
		}
	}
	begun := 0
	for name, at := range g.toSync {
		switch m := g.members[name]; {
		case m == nil || !m.live():
			delete(g.toSync, name)
		case !now.Before(at) && begun < exchangesAt:
			begun++
			delete(g.toSync, name)
			out = append(out, g.summaryLocked(m, now))
		}
	}
	for _, at := range g.toSync {
		g.dueLocked(later(at, now.Add(flushDelay)))
	}
	if g.changed {
		delay := time.Duration(showDelay)
		if g.others {
			delay += time.Duration(len(g.members)) * memberDelay
		}
		if at := g.shownAt.Add(delay); at.After(now) {
			g.dueLocked(at)
		} else {
			g.showLocked(now)
		}
	}
	return out
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// deltasLocked makes messages of what is pending for a member, to be acknowledged.
func (g *Gossip) deltasLocked(out []outgoing, m *member, cache map[key][]byte, now time.Time) []outgoing {
	var body []byte
	limit := maxDelta
	if m.streams.failed > 0 && len(m.pending) < 2000 { // a packet may get through where a stream does not
		limit = maxPacket - 3*maxName
	}
	keys := map[key]int{}
	flush := func() {
		if len(keys) == 0 {
			return
		}
		g.seq++
		body = appendFixed(body, 2, g.seq)
		o := g.toLocked(m, deltaKind, body)
		out = append(out, o)
		m.flights = append(m.flights, flight{g.seq, now, keys, len(o.b) > maxPacket})
		g.flying[m.name] = m
		body, keys = nil, map[key]int{}
	}
	for k, tries := range m.pending {
		c := g.store.cells[k]
		if c == nil {
			continue
		}
		b := cache[k]
		if b == nil {
			b = marshalCell(c)
			cache[k] = b
		}
		if len(body)+len(b) > limit {
			flush()
		}
		body = appendText(body, 1, b)
		keys[k] = tries
	}
	flush()
	m.pending = nil
	return out
}

// resendLocked has everything sent again that was not acknowledged in time.
func (g *Gossip) resendLocked(m *member, now time.Time) {
	kept := m.flights[:0]
	if !m.live() {
		m.flights = nil
	}
	for _, f := range m.flights {
		if now.Sub(f.sent) < ackWithin || f.streamed && m.streams.busy {
			kept = append(kept, f)
			continue
		}
		for k, tries := range f.keys {
			if _, newer := m.pending[k]; !newer && tries+1 < maxTries {
				g.pendLocked(m, k, tries+1)
			}
		}
	}
	m.flights = kept
}

// landedLocked notes an acknowledgement.
func (m *member) landedLocked(seq uint64) {
	for i, f := range m.flights {
		if f.seq == seq {
			m.flights = append(m.flights[:i], m.flights[i+1:]...)
			return
		}
	}
}

// cellsLocked makes messages of cells that nobody needs to acknowledge: the exchange goes on until all is equal.
func (g *Gossip) cellsLocked(out []outgoing, m *member, f gift, answer bool) []outgoing {
	var body []byte
	for _, c := range f.cells {
		if len(body)+len(c.value)+len(c.unknown)+2*maxKey > maxDelta {
			out = append(out, g.toLocked(m, deltaKind, body))
			body = nil
		}
		body = appendCell(body, 1, c)
	}
	if answer {
		body = appendVarint(body, 3, 1)
	}
	if f.more {
		body = appendVarint(body, 4, 1)
	}
	if len(body) > 0 {
		out = append(out, g.toLocked(m, deltaKind, body))
	}
	return out
}
