package director

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

// routes answers whether packets to an address leave without a gateway, and keeps host routes to some.
type routes interface {
	onLink(netip.Addr) (bool, error)
	hosts() ([]netip.Addr, error)
	addHost(netip.Addr) error
	setHosts([]netip.Addr) (taken []netip.Addr, err error)
	delHost(netip.Addr) error
}

// errNoRoute says that packets to an address leave nowhere.
var errNoRoute = errors.New("no route")

// settle is how long after an event the routes are asked again: one change comes with many events.
const settle = 100 * time.Millisecond

// reach remembers how real servers are reached, and asks again when the host's routes may have changed.
type reach struct {
	log     *slog.Logger
	routes  routes
	watch   *watch        // nil where routes never change
	events  chan struct{} // size 1: routes may have changed
	changed chan struct{} // size 1: an answer changed

	stop context.CancelFunc
	done sync.WaitGroup

	mu    sync.Mutex // guards the fields below; held while the kernel is asked, so that the newest answer stays
	gen   uint64     // one up when answers changed
	known map[netip.Addr]answer
	last  map[netip.Addr]bool // whether an address was on-link when it could last be reached
	kept  int                 // addresses that keep left
	hosts map[netip.Addr]bool // those that have a host route of ours, or get it again when they are reached
	stale bool                // hosts and the kernel may differ
}

// answer is how an address is reached; beside an error onLink is what it was before.
type answer struct {
	onLink bool
	err    error
}

// same reports whether two answers have the same consequences.
func (a answer) same(b answer) bool {
	return a.onLink == b.onLink && (a.err == nil) == (b.err == nil) && (a.err == nil || a.err.Error() == b.err.Error())
}

// newReach asks r, or the kernel if r is nil. close ends it.
func newReach(r routes, log *slog.Logger) (*reach, error) {
	reach := &reach{
		log: log, routes: r, events: make(chan struct{}, 1), changed: make(chan struct{}, 1),
		known: map[netip.Addr]answer{}, last: map[netip.Addr]bool{}, hosts: map[netip.Addr]bool{}, stale: true,
	}
	if r == nil {
		handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return nil, fmt.Errorf("opening a socket for routes: %w", err)
		}
		reach.routes = kernelRoutes{handle}
		if reach.watch, err = newWatch(reach.event, log, subscribe, again); err != nil {
			handle.Close()
			return nil, err
		}
	}
	life, stop := context.WithCancel(context.Background())
	reach.stop = stop
	reach.done.Go(func() { reach.run(life) })
	return reach, nil
}

func (r *reach) close() {
	if r.watch != nil {
		r.watch.close()
	}
	r.stop()
	r.done.Wait()
	if r.watch != nil {
		r.routes.(kernelRoutes).Close()
	}
}

// event says that routes may have changed.
func (r *reach) event() { poke(r.events) }

// poke leaves a value in a channel of size 1.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run asks again after events.
func (r *reach) run(life context.Context) {
	for {
		select {
		case <-life.Done():
			return
		case <-r.events:
		}
		select {
		case <-life.Done():
			return
		case <-time.After(settle):
		}
		select {
		case <-r.events:
		default:
		}
		r.refresh(life)
	}
}

// refresh asks for every known address again, and tells if any has another answer.
func (r *reach) refresh(life context.Context) {
	r.mu.Lock()
	r.renew() // or they would hide what changed
	addrs := slices.Collect(maps.Keys(r.known))
	r.mu.Unlock()
	differ := false
	for _, a := range addrs {
		if life.Err() != nil {
			return
		}
		r.mu.Lock()
		if before, still := r.known[a]; still {
			differ = !r.query(a).same(before) || differ
		}
		r.mu.Unlock()
	}
	if !differ {
		return
	}
	// Last of all, so that a pass that saw some of the old answers has an old generation.
	r.mu.Lock()
	r.gen++
	r.mu.Unlock()
	poke(r.changed)
}

// generation names the state of the routes: what was asked under another may have another answer now.
func (r *reach) generation() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.gen
}

func (r *reach) ask(a netip.Addr) answer {
	r.mu.Lock()
	defer r.mu.Unlock()
	if known, there := r.known[a]; there {
		return known
	}
	return r.query(a)
}

// query asks the kernel and remembers the answer. The caller holds mu.
func (r *reach) query(a netip.Addr) answer {
	var now answer
	now.onLink, now.err = r.routes.onLink(a)
	if now.err == nil {
		r.last[a] = now.onLink
	} else {
		// While nothing leads there nothing is edited: packets go nowhere either way, and what was comes back.
		now.onLink = r.last[a]
	}
	r.known[a] = now
	return now
}

// keep forgets addresses that no service has any more, now and then.
func (r *reach) keep(services []ravel.VirtualService) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.known) < 2*r.kept+100 {
		return
	}
	wanted := map[netip.Addr]bool{}
	for _, v := range services {
		for _, rs := range v.RealServers {
			wanted[rs.Addr] = true
		}
	}
	for a := range r.known {
		if !wanted[a] {
			delete(r.known, a)
			delete(r.last, a)
		}
	}
	r.kept = len(r.known)
}

// method returns how packets reach a real server, and what is wrong with that.
func (r *reach) method(rs ravel.RealServer) (uint32, *ravel.Problem) {
	if rs.Forwarding == ravel.Tunnel {
		return ipvs.ConnectionFlagTunnel, nil
	}
	where := "real server " + rs.Addr.String()
	is := r.ask(rs.Addr)
	switch {
	case rs.Forwarding == ravel.Direct && is.err != nil:
		return ipvs.ConnectionFlagDirectRoute, &ravel.Problem{
			Where: where, What: fmt.Sprintf("forwarding is direct, but it cannot be reached: %v", is.err), Fix: "ip route get " + rs.Addr.String(),
		}
	case rs.Forwarding == ravel.Direct && !is.onLink:
		return ipvs.ConnectionFlagDirectRoute, &ravel.Problem{
			Where: where, What: "forwarding is direct, but it is behind a gateway: its packets go astray",
			Fix: "set its forwarding to tunnel or auto",
		}
	}
	flag, way := uint32(ipvs.ConnectionFlagTunnel), "tunnel"
	if rs.Forwarding == ravel.Direct || is.onLink {
		flag, way = ipvs.ConnectionFlagDirectRoute, "direct"
	}
	if is.err != nil {
		return flag, &ravel.Problem{
			Where: where, What: fmt.Sprintf("cannot be reached: %v; forwarding stays %s", is.err, way), Fix: "ip route get " + rs.Addr.String(),
		}
	}
	return flag, nil
}

// kernelRoutes asks the kernel which way it would send.
type kernelRoutes struct{ *netlink.Handle }
