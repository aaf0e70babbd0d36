package director

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"

	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

// routes answers whether packets to an address leave without a gateway.
type routes interface {
	onLink(netip.Addr) (bool, error)
}

// errNoRoute says that packets to an address leave nowhere.
var errNoRoute = errors.New("no route")

// reach remembers how real servers are reached until the host's routes change.
type reach struct {
	routes  routes
	watch   *watch // nil where routes never change
	changed chan struct{}

	mu    sync.Mutex // guards the fields below
	gen   uint64     // one up with each change
	known map[netip.Addr]answer
	last  map[netip.Addr]bool // whether an address was on-link when it could last be reached
}

// answer is how an address is reached; beside an error onLink is what it was before.
type answer struct {
	onLink bool
	err    error
}

// newReach asks r, or the kernel if r is nil. close ends it.
func newReach(r routes, log *slog.Logger) (*reach, error) {
	reach := &reach{routes: r, changed: make(chan struct{}, 1), known: map[netip.Addr]answer{}, last: map[netip.Addr]bool{}}
	if r != nil {
		return reach, nil
	}
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a socket for routes: %w", err)
	}
	reach.routes = kernelRoutes{handle}
	if reach.watch, err = newWatch(reach.forget, log); err != nil {
		handle.Close()
		return nil, err
	}
	return reach, nil
}

func (r *reach) close() {
	if r.watch != nil {
		r.watch.close()
		r.routes.(kernelRoutes).Close()
	}
}

// forget drops what is known, and tells if anything was.
func (r *reach) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gen++
	if len(r.known) == 0 {
		return
	}
	clear(r.known)
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// generation names the state of the routes: what was asked under another may have another answer now.
func (r *reach) generation() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.gen
}

func (r *reach) ask(a netip.Addr) answer {
	r.mu.Lock()
	gen := r.gen
	known, there := r.known[a]
	r.mu.Unlock()
	if there {
		return known
	}
	var now answer
	now.onLink, now.err = r.routes.onLink(a)
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.err == nil {
		r.last[a] = now.onLink
	} else {
		// While a link is down nothing is edited: its packets go nowhere either way, and it comes back as it was.
		now.onLink = r.last[a]
	}
	if r.gen == gen {
		r.known[a] = now
	}
	return now
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

func (h kernelRoutes) onLink(a netip.Addr) (bool, error) {
	list, err := h.RouteGet(a.AsSlice())
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL):
		// The last two are answers of prohibit and blackhole routes.
		return false, fmt.Errorf("%w: %w", errNoRoute, err)
	case err != nil:
		return false, fmt.Errorf("asking for the route to %s: %w", a, err)
	case len(list) == 0:
		return false, errNoRoute
	}
	route := list[0]
	switch route.Type {
	case unix.RTN_UNICAST, unix.RTN_LOCAL:
	default:
		return false, errNoRoute
	}
	return len(route.Gw) == 0 && route.Via == nil && len(route.MultiPath) == 0, nil
}
