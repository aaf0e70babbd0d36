package bgp

import (
	"net/netip"
	"time"
)

const (
	// GoBGP rests for 5 s in Idle after a session or an attempt ended (holdtimeIdle in pkg/server/fsm.go; its
	// IdleHoldTimeAfterReset counts only after a reset by command). A peer that is taken out and put in again dials after
	// 1 to 2 s. After that many failures in a row we let it rest, as RFC 4271 section 8.1.1 wants for a peer that
	// oscillates.
	quickRetries = 10
	// GoBGP never dials again after a router sent too many routes.
	cappedPause = time.Minute
	// GoBGP waits 4 minutes for the OPEN of a router that took the connection and then fell silent.
	minOpenWait = 5 * time.Second
)

// keep restarts sessions that GoBGP holds back, until Close.
func (s *Speaker) keep() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-s.closing:
			return
		case <-s.sessions.nudge:
		case <-timer.C:
		}
		timer.Reset(s.restartDue())
	}
}

// restartDue takes every session that is due out of GoBGP and puts it in again, and returns when to look again.
func (s *Speaker) restartDue() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	due, again := s.sessions.due(time.Now())
	if s.stopped || s.gobgp == nil {
		return time.Hour
	}
	for _, addr := range due {
		p, held := s.peers[addr]
		if !held {
			continue
		}
		if err := s.gobgp.deletePeer(addr); err != nil {
			s.log.Warn("restarting a BGP session", "peer", addr, "err", err)
			continue
		}
		delete(s.peers, addr)
		s.sessions.restarted(addr)
		if err := s.addPeer(p); err != nil {
			s.log.Error("restarting a BGP session", "peer", addr, "err", err) // the next Apply adds it again
		}
	}
	return again
}

// due returns the sessions that GoBGP holds back and that we do not want to wait for, and when the next one will be.
func (t *sessions) due(now time.Time) (due []netip.Addr, again time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	again = time.Hour
	for addr, s := range t.table {
		var wait time.Duration
		switch {
		case s.capped:
			wait = cappedPause
		case s.idle && s.failures <= quickRetries:
		case s.state == openSent:
			wait = max(s.peer.HoldTime, minOpenWait)
		default:
			continue
		}
		if left := s.since.Add(wait).Sub(now); left > 0 {
			again = min(again, left)
			continue
		}
		if s.state == openSent {
			t.down(s, "the router took the connection and sent no OPEN")
			s.failures++
		}
		due = append(due, addr)
	}
	return due, again
}
