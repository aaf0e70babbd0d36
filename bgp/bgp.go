// Package bgp keeps BGP sessions to a set of routers (RFC 4271) and announces exactly a set of routes on all of them,
// with a GoBGP that runs inside the process.
//
// What it guarantees:
//   - nothing is announced that Apply was not given, and nothing that a router sent: routes of routers are refused on
//     the way in, and only own ones pass on the way out;
//   - a change touches what changed and nothing else: a session is restarted only when a setting of that very peer
//     changed, a route is sent again only when that very route changed;
//   - withdrawals go out before anything else, and at once;
//   - a session that ends is dialled again within two seconds, and then every one or two, until the router takes the
//     connection; one that ends over and over before it is up is given longer rests, and so is a router that sends
//     more routes than we have room for;
//   - no port is open unless a listening port is asked for, and there is never a gRPC listener.
//
// The kernel's routes are no business of this package: it neither reads nor writes them.
package bgp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/setdiff"
)

// ErrStopped is returned by Apply after Stop or Close.
var ErrStopped = errors.New("the BGP speaker has stopped")

// DefaultStopWait is how long Stop serves on between the withdrawals and the end of the sessions.
const DefaultStopWait = time.Second

// Options are the settings of a Speaker. The zero value dials out only and logs nowhere.
type Options struct {
	Log        *slog.Logger          // nil discards
	Registerer prometheus.Registerer // nil makes no metrics
	// RouterID is the BGP identifier (RFC 4271 section 4.2), an IPv4 address that no other speaker has. The zero value
	// takes the lowest IPv4 LocalAddr of the peers, or else a hash of Node. It is chosen when GoBGP starts and then
	// stays, whatever becomes of the peers. SetRouterID replaces it.
	RouterID netip.Addr
	Node     string // this director's name, for RouterID and for the text of a Cease
	// ListenPort is the TCP port on which routers may connect; 0 or less dials out only.
	ListenPort int
	// ListenAddrs are the addresses of ListenPort; none means all of the host.
	ListenAddrs []netip.Addr
	// StopWait is how long Stop waits between the withdrawals and the Cease, so that routers are done with them;
	// 0 means DefaultStopWait, less than 0 no wait.
	StopWait time.Duration
}

// Speaker holds BGP sessions and announces routes. Its methods may be called by many goroutines.
type Speaker struct {
	o        Options
	log      *slog.Logger
	sessions *sessions
	metrics  *metrics

	closing   chan struct{} // closed when the end begins: whatever waits, waits no longer
	closed    chan struct{} // closed when every goroutine has ended
	closeOnce sync.Once
	keeper    sync.WaitGroup // the goroutine of keep, if any

	mu       sync.Mutex // one change at a time; guards the fields below
	gobgp    *server    // nil until an Apply has peers
	peers    map[netip.Addr]settings
	stopped  bool
	keeping  bool
	routerID netip.Addr // of the running GoBGP

	// What others read while mu is held for a change. Its routes are written with both locks held, so that whoever
	// holds mu may read them without the other.
	view viewed
}

// viewed is what Status, Announced and the metrics show.
type viewed struct {
	sync.Mutex // guards the fields below
	gobgp      *server
	routerID   netip.Addr                   // of gobgp
	askedID    netip.Addr                   // that Options or SetRouterID ask for; none leaves it to us
	routes     map[netip.Prefix]ravel.Route // what GoBGP's table holds of ours
	desired    int                          // routes that the last Apply wanted
	changed    time.Time                    // when a route or peer last changed
	announces  uint64                       // routes added or replaced in GoBGP's table
	withdraws  uint64                       // routes taken from it
}

// New makes a Speaker. Nothing runs until Apply has peers. It panics if o.Registerer holds another Speaker's metrics.
func New(o Options) *Speaker {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.StopWait == 0:
		o.StopWait = DefaultStopWait
	case o.StopWait < 0:
		o.StopWait = 0
	}
	s := &Speaker{
		o:        o,
		log:      o.Log,
		sessions: newSessions(o.Log),
		closing:  make(chan struct{}),
		closed:   make(chan struct{}),
		peers:    map[netip.Addr]settings{},
	}
	s.view.routes = map[netip.Prefix]ravel.Route{}
	s.view.askedID = o.RouterID
	s.metrics = newMetrics(s)
	if o.Registerer != nil {
		o.Registerer.MustRegister(s.metrics)
	}
	return s
}

// SetRouterID sets the BGP identifier in the place of Options.RouterID, for callers that learn it after New; the zero
// value means what it means there. It counts for the next start of GoBGP, which is in the first Apply that has
// peers, or in one that changes LocalASN. A GoBGP that runs keeps its identifier, because another would end every
// session; Status then names the one that is asked for. It does not wait for an Apply that runs.
func (s *Speaker) SetRouterID(id netip.Addr) {
	s.view.Lock()
	defer s.view.Unlock()
	s.view.askedID = id
}

// Apply makes peers the sessions and routes the announcements, both as whole sets. It withdraws first, then ends,
// restarts and begins sessions, then announces. It returns when GoBGP's table is as wanted; sessions come up by
// themselves, later, and carry the table then.
//
// A peer or route that cannot be had stops no other: the error names each of them, what was held of it before stays,
// and the next Apply tries again. All peers must share LocalASN; if they do not, the sessions stay as they are while
// the routes are applied. When ctx ends, nothing more is announced, but withdrawals are made. After Stop or Close,
// Apply does nothing and returns ErrStopped.
func (s *Speaker) Apply(ctx context.Context, peers []ravel.Peer, routes []ravel.Route) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return ErrStopped
	}
	var errs []error
	fail := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	wantRoutes, badRoutes, err := checkRoutes(routes)
	fail(err)
	s.view.want(len(routes))
	wantPeers, badPeers, err := s.checkPeers(peers)
	fail(err)

	fail(s.withdraw(func(p netip.Prefix) bool {
		_, wanted := wantRoutes[p]
		return wanted || badRoutes[p]
	}))

	if err := oneLocalASN(peers); err != nil {
		fail(err)
	} else {
		fail(s.applyPeers(ctx, wantPeers, badPeers))
	}
	fail(s.announce(ctx, wantRoutes))
	return errors.Join(errs...)
}

// withdraw takes every route from the table that keep does not name.
func (s *Speaker) withdraw(keep func(netip.Prefix) bool) error {
	var errs []error
	var gone []netip.Prefix
	for prefix := range s.view.routes {
		if !keep(prefix) {
			gone = append(gone, prefix)
		}
	}
	slices.SortFunc(gone, comparePrefixes)
	for _, prefix := range gone {
		if err := s.gobgp.withdraw(s.view.routes[prefix]); err != nil {
			errs = append(errs, fmt.Errorf("withdrawing %s: %w", prefix, err))
			continue
		}
		s.view.withdrawn(prefix)
		s.log.Info("route withdrawn", "prefix", prefix)
	}
	return errors.Join(errs...)
}

// withdrawAll takes every route from the table, in one step.
func (s *Speaker) withdrawAll() error {
	n := len(s.view.routes)
	if n == 0 {
		return nil
	}
	if err := s.gobgp.withdrawAll(); err != nil {
		return fmt.Errorf("withdrawing all routes: %w", err)
	}
	s.view.withdrewAll()
	s.log.Info("all routes withdrawn", "routes", n)
	return nil
}

// announce adds and replaces routes in the table.
func (s *Speaker) announce(ctx context.Context, want map[netip.Prefix]ravel.Route) error {
	if s.gobgp == nil {
		return nil
	}
	var errs []error
	diff := setdiff.Maps(s.view.routes, want, comparePrefixes, equalRoutes)
	for _, prefix := range slices.Concat(diff.Add, diff.Change) {
		if ctx.Err() != nil {
			return errors.Join(append(errs, fmt.Errorf("announcing %s and what follows: %w", prefix, ctx.Err()))...)
		}
		if err := s.gobgp.announce(want[prefix]); err != nil {
			errs = append(errs, fmt.Errorf("announcing %s: %w", prefix, err))
			continue
		}
		s.view.announced(want[prefix])
		s.log.Info("route announced", "prefix", prefix, "next_hop", want[prefix].NextHop)
	}
	return errors.Join(errs...)
}

// applyPeers makes want the sessions. A peer in bad is wanted but cannot be had as it is: its session, if any, stays.
func (s *Speaker) applyPeers(ctx context.Context, want map[netip.Addr]settings, bad map[netip.Addr]bool) error {
	if asn, ok := localASN(want); ok && (s.gobgp == nil || s.gobgp.asn != asn) {
		if err := s.startServer(ctx, asn, want); err != nil {
			return err
		}
	}
	if s.gobgp == nil {
		return nil
	}
	var errs []error
	diff := setdiff.Maps(s.peers, want, netip.Addr.Compare, func(have, want settings) bool { return have == want })
	for _, addr := range diff.Remove {
		if bad[addr] {
			continue
		}
		s.log.Info("BGP peer removed", "peer", addr)
		if err := s.dropPeer(addr, "the peer was removed from the configuration"); err != nil {
			errs = append(errs, err)
			continue
		}
		s.sessions.forget(addr)
	}
	for _, addr := range diff.Change {
		s.log.Info("BGP peer's settings changed", "peer", addr)
		if err := s.dropPeer(addr, "the peer's settings changed"); err != nil {
			errs = append(errs, err)
			continue
		}
		diff.Add = append(diff.Add, addr)
	}
	for _, addr := range diff.Add {
		if err := s.addPeer(want[addr]); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (s *Speaker) addPeer(p settings) error {
	s.sessions.want(p.Peer)
	if err := s.gobgp.addPeer(p); err != nil {
		err = fmt.Errorf("adding peer %s: %w", p.Addr, err)
		s.sessions.failed(p.Addr, err.Error())
		return err
	}
	s.peers[p.Addr] = p
	s.view.touch()
	return nil
}

// dropPeer ends a session by a Cease (peer de-configured, RFC 4486).
func (s *Speaker) dropPeer(addr netip.Addr, why string) error {
	if err := s.gobgp.deletePeer(addr); err != nil {
		return fmt.Errorf("removing peer %s: %w", addr, err)
	}
	delete(s.peers, addr)
	s.sessions.ended(addr, why)
	s.view.touch()
	return nil
}

// startServer starts GoBGP with an AS number, in the place of the one that runs with another.
func (s *Speaker) startServer(ctx context.Context, asn uint32, peers map[netip.Addr]settings) error {
	if s.gobgp != nil {
		s.log.Warn("the local AS number changed: every BGP session restarts", "from", s.gobgp.asn, "to", asn)
		s.stopServer("the local AS number changed")
	}
	id := s.routerIDFor(peers)
	gobgp, err := startServer(ctx, s.o, asn, id, s.sessions)
	if err != nil {
		return fmt.Errorf("starting GoBGP with AS %d and router ID %s: %w", asn, id, err)
	}
	s.gobgp, s.routerID = gobgp, id
	s.view.serverIs(gobgp, id)
	s.log.Info("BGP speaker started", "asn", asn, "router_id", id)
	if !s.keeping {
		s.keeping = true
		s.keeper.Go(s.keep)
	}
	return nil
}

// stopServer ends every session and GoBGP with it. Nothing is announced afterwards.
func (s *Speaker) stopServer(why string) {
	if s.gobgp == nil {
		return
	}
	s.gobgp.stop()
	for addr := range s.peers {
		s.sessions.ended(addr, why)
	}
	s.gobgp = nil
	clear(s.peers)
	s.view.serverIs(nil, netip.Addr{})
}

// Announced returns the routes that GoBGP's table holds of ours, sorted. Routers have them once their session is up.
func (s *Speaker) Announced() []netip.Prefix {
	s.view.Lock()
	defer s.view.Unlock()
	prefixes := make([]netip.Prefix, 0, len(s.view.routes))
	for prefix := range s.view.routes {
		prefixes = append(prefixes, prefix)
	}
	slices.SortFunc(prefixes, comparePrefixes)
	return prefixes
}

// Changed returns a channel of size 1 that gets a value after a session changed its state. One reader at a time.
func (s *Speaker) Changed() <-chan struct{} { return s.sessions.changed }

func (v *viewed) want(n int) {
	v.Lock()
	defer v.Unlock()
	v.desired = n
}

func (v *viewed) touch() {
	v.Lock()
	defer v.Unlock()
	v.changed = time.Now()
}

func (v *viewed) announced(r ravel.Route) {
	v.Lock()
	defer v.Unlock()
	v.routes[r.Prefix] = r
	v.announces++
	v.changed = time.Now()
}

func (v *viewed) withdrawn(p netip.Prefix) {
	v.Lock()
	defer v.Unlock()
	delete(v.routes, p)
	v.withdraws++
	v.changed = time.Now()
}

func (v *viewed) withdrewAll() {
	v.Lock()
	defer v.Unlock()
	v.withdraws += uint64(len(v.routes))
	clear(v.routes)
	v.changed = time.Now()
}

// serverIs notes another GoBGP, whose table is empty.
func (v *viewed) serverIs(gobgp *server, id netip.Addr) {
	v.Lock()
	defer v.Unlock()
	v.gobgp, v.routerID = gobgp, id
	clear(v.routes)
	v.changed = time.Now()
}
