package gossip

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/ravel-lb/ravel"
)

// member is a process of the fleet as memberlist told us, and what is on its way to it.
type member struct {
	meta
	name string
	node memberlist.Node // a copy of our own
	addr netip.AddrPort

	sum uint64 // of name and address

	gone    time.Time // when it left or died; zero while it is there
	suspect time.Time // when our own probe failed; zero if it answers
	spoken  phase     // what its life cell says

	pending    map[key]int // cells to send, and how often they were sent in vain
	flights    []flight
	streams    streams
	synced     bool // we have heard all that it knew when we came
	rounds     int  // exchanges with it so far
	more       bool // the last one did not tell all: not all of it fitted
	given      int  // bytes of cells that its digests asked for since then
	givenSince time.Time
	asked      time.Time
	apart      time.Time // since when it knows other members than we do; zero if it does not
}

// flight is a delta that waits for its acknowledgement.
type flight struct {
	seq      uint64
	sent     time.Time
	keys     map[key]int
	streamed bool // it did not go as a packet
}

func (m *member) live() bool { return m.gone.IsZero() }

func (m *member) director() bool { return m.role == ravel.Director }

// state is the member's state in the words of ravel.
func (m *member) state() ravel.MemberState {
	switch said := max(m.phase, m.spoken); {
	case m.live() && m.suspect.IsZero():
		return ravel.Alive
	case m.live():
		return ravel.Suspect
	case said == restarting:
		return ravel.Restarting
	case said == leaving:
		return ravel.Left
	}
	return ravel.Dead
}

func (m *member) noun() ravel.Member {
	noun := ravel.Member{
		Name: m.name, Role: m.role, Gossip: m.addr, Addrs: m.addrs, Version: m.version, Wire: m.wire, State: m.state(),
	}
	for _, k := range m.keys {
		noun.Keys = append(noun.Keys, hex.EncodeToString([]byte(k)))
	}
	return noun
}

// delegate is what memberlist calls. It holds locks of memberlist meanwhile, so nothing here waits or calls it back.
type delegate struct{ g *Gossip }

var (
	_ memberlist.Delegate         = delegate{}
	_ memberlist.EventDelegate    = delegate{}
	_ memberlist.ConflictDelegate = delegate{}
	_ memberlist.AliveDelegate    = delegate{}
	_ memberlist.PingDelegate     = delegate{}
)

// NodeMeta is what memberlist spreads of us.
func (d delegate) NodeMeta(limit int) []byte {
	d.g.mu.Lock()
	defer d.g.mu.Unlock()
	b, err := marshalMeta(d.g.meta())
	if err != nil || len(b) > limit {
		return nil // New has seen to it that it fits
	}
	return append(b, d.g.newer...)
}

// NotifyMsg takes a message from memberlist.
func (d delegate) NotifyMsg(b []byte) {
	d.g.take(bytes.Clone(b))
}

// take has the loop read a message, unless too many wait: then it is lost, as a packet may be.
func (g *Gossip) take(b []byte) {
	if len(b) > maxMessage {
		g.metrics.drop("oversized")
		return
	}
	if g.inBytes.Add(int64(len(b))) > maxInBytes {
		g.inBytes.Add(-int64(len(b)))
		g.metrics.drop("busy")
		return
	}
	select {
	case g.inbox <- b:
	default:
		g.inBytes.Add(-int64(len(b)))
		g.metrics.drop("busy")
	}
}

// GetBroadcasts returns nothing: what we spread goes straight to those concerned.
func (d delegate) GetBroadcasts(int, int) [][]byte { return nil }

// LocalState is our part of memberlist's exchange of all that it knows: only that we are there.
func (d delegate) LocalState(join bool) []byte {
	if !join {
		return nil
	}
	return seal(helloKind, d.g.config.Name, d.g.config.Advertise, nil)
}

// MergeRemoteState takes that of another.
func (d delegate) MergeRemoteState(b []byte, join bool) {
	if join {
		d.g.take(bytes.Clone(b))
	}
}

// NotifyAlive refuses members that no release of this program can be.
func (d delegate) NotifyAlive(n *memberlist.Node) error {
	_, ok := parseMeta(n.Meta)
	_, plain := nodeAddr(n)
	if !ok || !plain || n.Name == "" || len(n.Name) > maxName {
		d.g.metrics.drop("meta")
		return errors.New("its meta data is not ours")
	}
	return nil
}

func nodeAddr(n *memberlist.Node) (netip.AddrPort, bool) {
	a, ok := netip.AddrFromSlice(n.Addr)
	return netip.AddrPortFrom(a.Unmap(), n.Port), ok
}

// NotifyJoin says that a member is there, new or back.
func (d delegate) NotifyJoin(n *memberlist.Node) { d.g.joined(n) }

// NotifyUpdate says that a member's meta data changed.
func (d delegate) NotifyUpdate(n *memberlist.Node) { d.g.joined(n) }

// NotifyLeave says that a member left or died.
func (d delegate) NotifyLeave(n *memberlist.Node) {
	g := d.g
	g.mu.Lock()
	defer g.mu.Unlock()
	m := g.members[n.Name]
	if m == nil || n.Name == g.config.Name {
		return
	}
	m.gone = time.Now()
	g.sumKnown = false
	m.pending, m.flights, m.synced, m.rounds = nil, nil, false, 0
	delete(g.toSend, m.name)
	delete(g.toSync, m.name)
	if p, ok := g.known[m.name]; ok {
		p.seen = m.gone
		g.known[m.name] = p
	}
	if m.state() == ravel.Left {
		delete(g.known, m.name) // whoever left for good comes back by itself, if at all
	}
	clear(g.reached) // a seed that was reached may have been this one
	g.log.Info("a member is gone", "member", m.name, "role", m.role, "state", m.state())
	g.changed, g.others = true, true
	g.soonLocked()
}

func (g *Gossip) joined(n *memberlist.Node) {
	meta, ok := parseMeta(n.Meta)
	addr, plain := nodeAddr(n)
	if !ok || !plain {
		return // NotifyAlive refused it
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	m := g.members[n.Name]
	if m == nil {
		m = &member{name: n.Name}
		g.members[n.Name] = m
	}
	fresh := !m.live() || m.node.Name == ""
	if fresh && meta.phase == up {
		m.spoken = 0
	}
	if fresh {
		m.streams.failed, m.streams.until = 0, time.Time{}
	}
	for _, a := range m.addrs {
		delete(g.byAddr[a], m.name)
		if len(g.byAddr[a]) == 0 {
			delete(g.byAddr, a)
		}
	}
	m.meta, m.addr, m.gone, m.suspect = meta, addr, time.Time{}, time.Time{}
	g.sumKnown = false
	m.sum = newHash().text(m.name).text(addrPortName(addr)).sum()
	m.node = memberlist.Node{
		Name: n.Name, Addr: append(net.IP(nil), n.Addr...), Port: n.Port,
		PMin: n.PMin, PMax: n.PMax, PCur: n.PCur, DMin: n.DMin, DMax: n.DMax, DCur: n.DCur,
	}
	for _, a := range m.addrs {
		if g.byAddr[a] == nil {
			g.byAddr[a] = map[string]*member{}
		}
		g.byAddr[a][m.name] = m
	}
	delete(g.directors, m.name)
	if m.director() {
		g.directors[m.name] = m
	}
	g.store.setPresent(m.name, true)
	g.changed, g.others = true, true
	g.soonLocked()
	if m.name == g.config.Name {
		return
	}
	g.knowLocked(m.name, addr)
	if fresh {
		g.log.Info("a member is there", "member", m.name, "role", m.role, "gossip", m.addr, "version", m.version)
		if m.director() && g.settle.settled {
			// In a big fleet not all at once.
			g.syncLocked(m, jitter(min(g.timing.exchange, time.Duration(len(g.members))*time.Millisecond)))
		}
	}
}

// AckPayload is empty.
func (d delegate) AckPayload() []byte { return nil }

// NotifyPingComplete says that a member answered our probe.
func (d delegate) NotifyPingComplete(n *memberlist.Node, _ time.Duration, _ []byte) {
	d.g.suspected(n.Name, time.Time{})
}

// suspected notes since when a member does not answer us; the zero time is that it does. memberlist does not tell
// whom others suspect, so Suspect is what our own probes say.
func (g *Gossip) suspected(name string, since time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	m := g.members[name]
	if m == nil || !m.live() || m.suspect.IsZero() == since.IsZero() {
		return
	}
	m.suspect = since
	g.changed, g.others = true, true
	g.soonLocked()
}

// conflict is a second process under a member's name.
type conflict struct {
	name   string
	addrs  [2]netip.AddrPort
	seen   time.Time
	logged time.Time
}

// forgetConflict is how long after its last sign a conflict is over.
const forgetConflict = 30 * time.Second

func (c conflict) problem() ravel.Problem {
	return ravel.Problem{
		Where: "gossip",
		What: fmt.Sprintf("two processes are called %s, at %s and at %s; only the first one is heard. If it has moved, "+
			"this ends when the other one is seen to be dead", c.name, c.addrs[0], c.addrs[1]),
		Fix: "give each director and node a name of its own",
	}
}

// NotifyConflict says that a second address claims a live member's name.
func (d delegate) NotifyConflict(existing, other *memberlist.Node) {
	g := d.g
	a, _ := nodeAddr(existing)
	b, _ := nodeAddr(other)
	g.metrics.conflicts.Inc()
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	c := g.conflicts[existing.Name]
	c.name, c.addrs, c.seen = existing.Name, [2]netip.AddrPort{a, b}, now
	if now.Sub(c.logged) > time.Minute {
		c.logged = now
		g.log.Warn("two members have one name", "member", c.name, "heard", a, "not_heard", b)
	}
	g.conflicts[existing.Name] = c
}

// sweepLocked forgets what is long over.
func (g *Gossip) sweepLocked(now time.Time) {
	for name, m := range g.members {
		switch {
		case !m.live() && now.Sub(m.gone) > remember:
			delete(g.members, name)
			delete(g.directors, name)
			for _, a := range m.addrs {
				delete(g.byAddr[a], name)
			}
			g.store.forgetAuthor(name)
			g.changed, g.others = true, true
		case m.live() && !m.suspect.IsZero() && now.Sub(m.suspect) > 2*g.config.Preset.DetectWithin(len(g.members)):
			m.suspect = time.Time{} // it has refuted that it is dead, or we would know
			g.changed, g.others = true, true
		}
	}
	for name, c := range g.conflicts {
		if now.Sub(c.seen) > forgetConflict {
			delete(g.conflicts, name)
		}
	}
	for name, a := range g.store.authors {
		switch {
		case g.members[name] != nil || name == g.config.Name:
			delete(g.strangers, name)
		case g.strangers[name].IsZero():
			g.strangers[name] = now
			g.store.setPresent(name, false)
		case now.Sub(g.strangers[name]) > remember && !a.present:
			g.store.forgetAuthor(name)
			delete(g.strangers, name)
		}
	}
	g.store.openGraves(now)
	if g.config.Role == ravel.Realserver {
		g.tidyLocked()
	}
}

// tidyLocked drops, on a realserver, what does not concern it any more.
func (g *Gossip) tidyLocked() {
	me := g.members[g.config.Name]
	if me == nil {
		return
	}
	for k, c := range g.store.cells {
		if !g.store.concerns(me, k) {
			g.store.remove(c)
			g.changed = true
		}
	}
}

// membersLocked are all members by name.
func (g *Gossip) membersLocked() []ravel.Member {
	all := make([]ravel.Member, 0, len(g.members))
	for _, m := range g.members {
		all = append(all, m.noun())
	}
	slices.SortFunc(all, func(a, b ravel.Member) int { return strings.Compare(a.Name, b.Name) })
	return all
}
