package bgp

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	api "github.com/osrg/gobgp/v3/api"
	"github.com/osrg/gobgp/v3/pkg/log"
	gobgp "github.com/osrg/gobgp/v3/pkg/server"

	"github.com/ravel-lb/ravel"
)

// server is a GoBGP that runs. All of GoBGP's management calls queue for the one goroutine of Serve; none of them
// heeds its context, and none returns once that goroutine has gone.
type server struct {
	bgp  *gobgp.BgpServer
	asn  uint32
	exit *exit
	done chan struct{} // closed when the goroutine of Serve has ended

	peers map[netip.Addr]bool // that the server has; for the Speaker's mu to guard
	added uint64              // peers ever added; as above
	freed *freed

	use  sync.RWMutex // held for reading by calls that may come at any time, for writing while Serve ends
	gone bool         // guarded by use
}

// exit ends the goroutine of Serve, which has no end of its own (v3.37.0). Serve calls the hook after each thing
// that it did, and a goroutine may leave from anywhere. The flag has to be raised by that very goroutine, in the
// middle of the last thing that it is to do, or else it might leave before that and whoever asked for it would wait
// for ever. So the last thing is to delete a policy, about which GoBGP writes a line to our log.
type exit struct{ now atomic.Bool }

// lastPolicy is the name of the policy whose deletion ends Serve.
const lastPolicy = "end-of-serve"

// Observe is called by GoBGP, in the goroutine of Serve.
func (e *exit) Observe(gobgp.FSMOperation, time.Duration, time.Duration) {
	if e.now.Load() {
		runtime.Goexit()
	}
}

// hears is told of every line of the log.
func (e *exit) hears(msg string, f log.Fields) {
	if msg == "delete policy" && f["Key"] == lastPolicy {
		e.now.Store(true)
	}
}

// freed counts the peers whose goroutines have ended. StopBgp wipes the global settings while the goroutines of the
// peers that it deletes still read them, so each peer must be gone before.
type freed struct {
	n       atomic.Uint64
	changed chan struct{} // size 1
}

func (f *freed) hears(msg string) {
	if msg == "freed fsm.h" {
		f.n.Add(1)
		poke(f.changed)
	}
}

// ownRoutesOnly is the policy in both directions: what is not our own is neither taken in nor passed on.
const ownRoutesOnly = "own-routes-only"

func startServer(ctx context.Context, o Options, asn uint32, id netip.Addr, observer *sessions) (*server, error) {
	s := &server{
		asn: asn, exit: &exit{}, done: make(chan struct{}),
		peers: map[netip.Addr]bool{}, freed: &freed{changed: make(chan struct{}, 1)},
	}
	s.bgp = gobgp.NewBgpServer(
		gobgp.LoggerOption(&logger{log: o.Log.With("library", "gobgp"), observer: observer, exit: s.exit, freed: s.freed}),
		gobgp.TimingHookOption(s.exit),
	)
	go func() {
		defer close(s.done)
		s.bgp.Serve()
	}()
	if err := s.configure(ctx, o, id); err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

func (s *server) configure(ctx context.Context, o Options, id netip.Addr) error {
	global := &api.Global{Asn: s.asn, RouterId: id.String(), ListenPort: -1}
	if o.ListenPort > 0 {
		global.ListenPort = int32(o.ListenPort)
		for _, addr := range o.ListenAddrs {
			global.ListenAddresses = append(global.ListenAddresses, addr.String())
		}
	}
	if err := s.bgp.StartBgp(ctx, &api.StartBgpRequest{Global: global}); err != nil {
		return err
	}
	policy := &api.Policy{
		Name: ownRoutesOnly,
		Statements: []*api.Statement{{
			Name:       ownRoutesOnly,
			Conditions: &api.Conditions{RouteType: api.Conditions_ROUTE_TYPE_LOCAL},
			Actions:    &api.Actions{RouteAction: api.RouteAction_ACCEPT},
		}},
	}
	if err := s.bgp.AddPolicy(ctx, &api.AddPolicyRequest{Policy: policy}); err != nil {
		return fmt.Errorf("making the policy %s: %w", ownRoutesOnly, err)
	}
	for _, direction := range []api.PolicyDirection{api.PolicyDirection_IMPORT, api.PolicyDirection_EXPORT} {
		err := s.bgp.SetPolicyAssignment(ctx, &api.SetPolicyAssignmentRequest{Assignment: &api.PolicyAssignment{
			Name:          "global",
			Direction:     direction,
			Policies:      []*api.Policy{{Name: ownRoutesOnly}},
			DefaultAction: api.RouteAction_REJECT,
		}})
		if err != nil {
			return fmt.Errorf("setting the policy %s for %s: %w", ownRoutesOnly, direction, err)
		}
	}
	return nil
}

func (s *server) announce(r ravel.Route) error {
	path, err := gobgpPath(r)
	if err != nil {
		return err
	}
	_, err = s.bgp.AddPath(context.Background(), &api.AddPathRequest{TableType: api.TableType_GLOBAL, Path: path})
	return err
}

func (s *server) withdraw(r ravel.Route) error {
	path, err := gobgpPath(ravel.Route{Prefix: r.Prefix, NextHop: r.NextHop}) // the rest does not matter here
	if err != nil {
		return err
	}
	return s.bgp.DeletePath(context.Background(), &api.DeletePathRequest{TableType: api.TableType_GLOBAL, Path: path})
}

// withdrawAll is withdraw for all own routes at once.
func (s *server) withdrawAll() error {
	return s.bgp.DeletePath(context.Background(), &api.DeletePathRequest{TableType: api.TableType_GLOBAL})
}

func (s *server) addPeer(p settings) error {
	if err := s.bgp.AddPeer(context.Background(), &api.AddPeerRequest{Peer: gobgpPeer(p)}); err != nil {
		return err
	}
	s.peers[p.Addr] = true
	s.added++
	return nil
}

func (s *server) deletePeer(addr netip.Addr) error {
	if err := s.bgp.DeletePeer(context.Background(), &api.DeletePeerRequest{Address: addr.String()}); err != nil {
		return err
	}
	delete(s.peers, addr)
	return nil
}

// cease queues a Cease (administrative shutdown) with a reason (RFC 9003) behind all that the session has yet to send.
func (s *server) cease(addr netip.Addr, reason string) error {
	request := &api.ShutdownPeerRequest{Address: addr.String(), Communication: reason}
	return s.bgp.ShutdownPeer(context.Background(), request)
}

// list calls fn with each peer as GoBGP sees it, routes counted. It calls nothing once the server has stopped.
func (s *server) list(ctx context.Context, fn func(*api.Peer)) error {
	s.use.RLock()
	defer s.use.RUnlock()
	if s.gone {
		return nil
	}
	return s.bgp.ListPeer(ctx, &api.ListPeerRequest{EnableAdvertised: true}, fn)
}

// stop ends all sessions by a Cease, closes the listeners and waits for every goroutine of the server. A router that
// has stopped reading can hold it up for its hold time, until GoBGP's write to it fails.
func (s *server) stop() {
	for addr := range s.peers {
		if err := s.deletePeer(addr); err != nil {
			s.added-- // it was not there, so it will not be freed
		}
	}
	for s.freed.n.Load() < s.added {
		<-s.freed.changed
	}
	_ = s.bgp.StopBgp(context.Background(), &api.StopBgpRequest{}) // returns nil always
	s.use.Lock()
	defer s.use.Unlock()
	s.gone = true
	last := &api.Policy{Name: lastPolicy}
	err := s.bgp.AddPolicy(context.Background(), &api.AddPolicyRequest{Policy: last})
	if err == nil {
		err = s.bgp.DeletePolicy(context.Background(), &api.DeletePolicyRequest{Policy: last, All: true})
	}
	if err == nil {
		<-s.done
	}
}
