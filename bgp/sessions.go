package bgp

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	gobgplog "github.com/osrg/gobgp/v3/pkg/log"
	"github.com/osrg/gobgp/v3/pkg/packet/bgp"

	"github.com/ravel-lb/ravel"
)

// sessions is what became of each wanted peer, told by GoBGP's log. Its lock is a leaf: nothing is called with it held
// but slog.
type sessions struct {
	log     *slog.Logger
	changed chan struct{} // size 1: some session changed its state
	nudge   chan struct{} // size 1: the keeper has something to look at

	mu    sync.Mutex // guards the fields below
	table map[netip.Addr]*session
	fatal string // GoBGP's last Panic or Fatal
}

type session struct {
	peer  ravel.Peer
	state state
	since time.Time // when state began

	flaps       uint64 // times that an established session ended otherwise than by our own hand
	updates     uint64 // UPDATE messages sent
	lastError   string
	lastErrorAt time.Time

	detail   string // what the log said of the next end of the session
	logged   string // the last reason that was logged for a session that does not come up
	failures int    // attempts that ended since the session was last established
	idle     bool   // GoBGP holds the session back after a failure
	capped   bool   // and would for ever: the router sent too many routes
	leaving  bool   // we are about to end the session
}

// state is a session's state by RFC 4271 section 8.2.2. GoBGP dials in Active and has no Connect.
type state string

const (
	idle        state = "Idle"
	active      state = "Active"
	openSent    state = "OpenSent"
	openConfirm state = "OpenConfirm"
	established state = "Established"
)

var gobgpStates = map[string]state{
	bgp.BGP_FSM_IDLE.String():        idle,
	bgp.BGP_FSM_CONNECT.String():     active,
	bgp.BGP_FSM_ACTIVE.String():      active,
	bgp.BGP_FSM_OPENSENT.String():    openSent,
	bgp.BGP_FSM_OPENCONFIRM.String(): openConfirm,
	bgp.BGP_FSM_ESTABLISHED.String(): established,
}

func newSessions(log *slog.Logger) *sessions {
	return &sessions{
		log:     log,
		changed: make(chan struct{}, 1),
		nudge:   make(chan struct{}, 1),
		table:   map[netip.Addr]*session{},
	}
}

// poke sends unless a value waits already.
func poke(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// want notes a peer's settings, for Status and the metrics.
func (t *sessions) want(p ravel.Peer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.table[p.Addr]; s != nil {
		s.peer = p
		return
	}
	t.table[p.Addr] = &session{peer: p, state: idle, since: time.Now()}
}

func (t *sessions) forget(addr netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.table, addr)
}

func (t *sessions) forgetAllBut(keep func(netip.Addr) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for addr := range t.table {
		if !keep(addr) {
			delete(t.table, addr)
		}
	}
}

// failed notes an error that came from outside GoBGP's state machine.
func (t *sessions) failed(addr netip.Addr, why string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.table[addr]; s != nil {
		s.lastError, s.lastErrorAt = why, time.Now()
	}
}

// ended notes that we ended or restarted a session on purpose: no flap. GoBGP does not log that as a change of state.
func (t *sessions) ended(addr netip.Addr, why string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.table[addr]
	if s == nil {
		return
	}
	if s.state == established {
		t.log.Info("BGP session ended", "peer", addr, "reason", why, "after", time.Since(s.since).Round(time.Second))
	}
	s.enter(idle)
	s.detail, s.logged, s.failures = "", "", 0
	poke(t.changed)
}

// restarted notes that the keeper took a session out of its wait.
func (t *sessions) restarted(addr netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.table[addr]; s != nil {
		s.enter(idle)
		s.detail = ""
	}
}

func (s *session) enter(to state) {
	if s.state != to {
		s.since = time.Now()
	}
	s.state, s.idle, s.capped = to, false, false
}

// anyEstablished reports whether some router has our routes.
func (t *sessions) anyEstablished() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.table {
		if s.state == established {
			return true
		}
	}
	return false
}

// leave reports whether a session is established, which we are then about to end.
func (t *sessions) leave(addr netip.Addr) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.table[addr]
	if s == nil || s.state != established {
		return false
	}
	s.leaving = true
	return true
}

// internal notes a fault of GoBGP itself.
func (t *sessions) internal(msg string, f gobgplog.Fields) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fatal = msg
	if s := t.of(f); s != nil {
		s.lastError, s.lastErrorAt = msg, time.Now()
	}
}

// of finds the session that a log line is about, if any.
func (t *sessions) of(f gobgplog.Fields) *session {
	key, _ := f["Key"].(string)
	addr, err := netip.ParseAddr(key)
	if err != nil {
		return nil
	}
	return t.table[addr]
}

// observe reads a line of GoBGP's log. It never blocks. The lines and fields are those of pkg/server/fsm.go of
// v3.37.0; a line that it does not know means nothing to it.
func (t *sessions) observe(msg string, f gobgplog.Fields) {
	if topic, _ := f["Topic"].(string); topic != "Peer" {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.of(f)
	if s == nil {
		return
	}
	switch msg {
	case "sent update":
		s.updates++
	case "failed to connect":
		if err, ok := f["Error"].(error); ok {
			t.down(s, dialReason(err, s.peer))
		}
	case "failed to set md5":
		// Go listens with MPTCP where it can, and MPTCP has no MD5: GODEBUG=multipathtcp=0 turns that off.
		t.down(s, fmt.Sprintf("setting the MD5 key on the listening port: %v", f["Err"]))
	case "received notification":
		s.detail = "the router sent " + notificationOf(f)
	case "sent notification":
		s.detail = "we sent " + notificationOf(f)
		code, sub, _ := codesOf(f)
		if code == bgp.BGP_ERROR_CEASE && sub == bgp.BGP_ERROR_SUB_MAXIMUM_NUMBER_OF_PREFIXES_REACHED {
			s.detail = fmt.Sprintf("the router sent more than %d routes of one family: "+
				"filter what it sends to directors", maxReceived)
			s.capped = true
		}
	case "state changed":
		name, _ := f["new"].(string)
		if to, known := gobgpStates[name]; known {
			t.move(s, to, fmt.Sprint(f["reason"]))
		}
	}
}

// move follows a session to another state.
func (t *sessions) move(s *session, to state, reason string) {
	from, after, capped := s.state, time.Since(s.since).Round(time.Second), s.capped
	s.enter(to)
	switch {
	case to == established:
		s.failures, s.detail, s.logged = 0, "", ""
		t.log.Info("BGP session up", "peer", s.peer.Addr, "asn", s.peer.ASN)
	case to == idle:
		s.idle, s.capped = true, capped
		why := endReason(reason, s.detail)
		s.detail = ""
		if from == established {
			if !s.leaving {
				s.flaps++
			}
			s.lastError, s.lastErrorAt = why, time.Now()
			t.log.Info("BGP session down", "peer", s.peer.Addr, "asn", s.peer.ASN, "reason", why, "after", after)
		} else {
			s.failures++
			t.down(s, why)
		}
		poke(t.nudge)
	case to == openSent:
		poke(t.nudge) // the keeper bounds the wait for the router's OPEN
	}
	if from != to {
		poke(t.changed)
	}
}

// down notes why a session does not come up, and logs it once for as long as it stays the same.
func (t *sessions) down(s *session, why string) {
	s.lastError, s.lastErrorAt = why, time.Now()
	if s.logged != why {
		s.logged = why
		t.log.Info("BGP session does not come up", "peer", s.peer.Addr, "asn", s.peer.ASN, "reason", why)
	}
}

// dialReason says why a TCP connection could not be had.
func dialReason(err error, p ravel.Peer) string {
	to := netip.AddrPortFrom(p.Addr, p.Port)
	var errno syscall.Errno
	var timeout net.Error
	switch {
	case errors.As(err, &errno) && errno == syscall.EADDRNOTAVAIL && p.LocalAddr.IsValid():
		return fmt.Sprintf("connecting to %s: this host does not hold the local address %s", to, p.LocalAddr)
	case errors.As(err, &errno):
		return fmt.Sprintf("connecting to %s: %s", to, errno)
	case errors.As(err, &timeout) && timeout.Timeout() && p.PasswordFile != "":
		return fmt.Sprintf("connecting to %s: no answer: it is away, or its MD5 key differs from ours", to)
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Sprintf("connecting to %s: no answer: it is away, or it wants an MD5 key", to)
	}
	return fmt.Sprintf("connecting to %s: %s", to, err)
}

// endReason says why a session went to Idle: by GoBGP's word for it and what the log said just before.
func endReason(reason, detail string) string {
	switch word, _, _ := strings.Cut(reason, " "); word {
	case "hold-timer-expired":
		return "hold timer expired: the router was silent for too long"
	case "read-failed":
		if detail == "" { // else the router may have closed it because of what was said before
			return "the router closed or reset the connection"
		}
	case "write-failed":
		return "writing to the router failed: it stopped reading, or the connection broke"
	case "invalid-msg":
		if detail == "" {
			// GoBGP keeps nothing of a NOTIFICATION that comes before the session is established.
			return "the router did not accept our OPEN: its log says why (often an AS number, or no such neighbour there)"
		}
	}
	if detail != "" {
		return detail
	}
	return reason
}

// codesOf takes a NOTIFICATION's numbers from a log line, in either of the two forms that GoBGP writes.
func codesOf(f gobgplog.Fields) (code, sub uint8, text string) {
	if e, ok := f["Data"].(*bgp.MessageError); ok {
		return e.TypeCode, e.SubTypeCode, e.Message
	}
	code, _ = f["Code"].(uint8)
	sub, _ = f["Subcode"].(uint8)
	text, _ = f["Communicated-Reason"].(string)
	return code, sub, text
}

func notificationOf(f gobgplog.Fields) string {
	code, sub, text := codesOf(f)
	return notification(code, sub, text)
}

// notification writes a NOTIFICATION in the words of the RFCs.
func notification(code, sub uint8, text string) string {
	words := fmt.Sprintf("NOTIFICATION %d/%d", code, sub)
	if name := notificationNames[[2]uint8{code, 0}]; name != "" {
		words += " " + name
		if detail := notificationNames[[2]uint8{code, sub}]; sub != 0 && detail != "" {
			words += ": " + detail
		}
	}
	if text != "" {
		words += fmt.Sprintf(" (%q)", text)
	}
	return words
}

// notificationNames is IANA's registry of NOTIFICATION codes and subcodes, as far as a session like ours meets them.
var notificationNames = map[[2]uint8]string{
	{1, 0}:  "message header error", // RFC 4271 section 6.1
	{1, 1}:  "connection not synchronized",
	{1, 2}:  "bad message length",
	{1, 3}:  "bad message type",
	{2, 0}:  "OPEN message error", // section 6.2
	{2, 1}:  "unsupported version number",
	{2, 2}:  "bad peer AS",
	{2, 3}:  "bad BGP identifier",
	{2, 4}:  "unsupported optional parameter",
	{2, 6}:  "unacceptable hold time",
	{2, 7}:  "unsupported capability", // RFC 5492
	{3, 0}:  "UPDATE message error",   // section 6.3
	{3, 1}:  "malformed attribute list",
	{3, 2}:  "unrecognized well-known attribute",
	{3, 3}:  "missing well-known attribute",
	{3, 4}:  "attribute flags error",
	{3, 5}:  "attribute length error",
	{3, 6}:  "invalid ORIGIN attribute",
	{3, 8}:  "invalid NEXT_HOP attribute",
	{3, 9}:  "optional attribute error",
	{3, 10}: "invalid network field",
	{3, 11}: "malformed AS_PATH",
	{4, 0}:  "hold timer expired",
	{5, 0}:  "finite state machine error", // RFC 6608
	{6, 0}:  "Cease",                      // RFC 4486
	{6, 1}:  "maximum number of prefixes reached",
	{6, 2}:  "administrative shutdown",
	{6, 3}:  "peer de-configured",
	{6, 4}:  "administrative reset",
	{6, 5}:  "connection rejected",
	{6, 6}:  "other configuration change",
	{6, 7}:  "connection collision resolution",
	{6, 8}:  "out of resources",
	{6, 9}:  "hard reset", // RFC 8538
	{6, 10}: "BFD down",   // RFC 9384
}
