// Package ifaddr holds VIPs on one dummy link of Ravel's own, and keeps them from being answered for on the network.
//
// It guarantees that no other link and no address on one is ever touched; that a VIP is added before its blackhole
// route goes and removed after that route is there, so that packets for it reach either this host's own rules or
// nobody; and that no ARP request or neighbour solicitation from another link is answered for a VIP.
//
// The link is Ravel's if it is a dummy of the right name that carries the alias "ravel"; so are all addresses on it,
// and all blackhole routes with Ravel's protocol number, also after a restart.
package ifaddr

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
	"github.com/ravel-lb/ravel/internal/sysctl"
)

const (
	// DefaultLink is the name of the link that holds VIPs.
	DefaultLink = "ravel0"
	// DefaultBlackhole is how long a removed VIP leaves a blackhole route behind.
	DefaultBlackhole = time.Minute

	alias = "ravel" // the proof that a link is ours
)

// Options are what New needs. Zero values mean the defaults.
type Options struct {
	Log        *slog.Logger
	Registerer prometheus.Registerer // nil registers nothing
	Sysctl     *sysctl.Setter
	Link       string        // the name of the dummy link
	Blackhole  time.Duration // how long a removed VIP's packets are dropped
}

// Links holds VIPs. Its methods are safe for use by many goroutines.
type Links struct {
	log       *slog.Logger
	name      string
	blackhole time.Duration
	kernel    kernel
	sysctl    *sysctl.Setter
	metrics   *metrics
	now       func() time.Time
	changed   chan struct{} // size 1

	mu        sync.Mutex // guards the fields below
	watch     *watch     // nil before the first Apply and after Close
	closed    bool
	swept     bool // links of ours under other names are gone
	known     bool // the fields below are what the kernel holds
	before    bool // they were, so that a difference to them is drift
	index     int  // of the link; 0 if it is not there
	held      map[netip.Addr]bool
	holes     map[netip.Addr]time.Time // blackhole routes of ours, and when each is due to go
	elsewhere map[netip.Addr]string    // addresses on other links, as last read
	sysctls   []ravel.Problem          // settings that could not be made
	foreign   *ravel.Problem           // a link of our name that is not ours
	last      time.Time                // the end of the last Apply
	twice     map[netip.Addr]string    // wanted VIPs that another link holds too
}

// New returns Links that have touched nothing yet. From the first Apply on Close is to be called in the end.
func New(o Options) *Links {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Link == "" {
		o.Link = DefaultLink
	}
	if o.Blackhole == 0 {
		o.Blackhole = DefaultBlackhole
	}
	if o.Sysctl == nil {
		o.Sysctl = sysctl.New("/proc/sys", "")
	}
	return &Links{
		log:       o.Log.With("component", "ifaddr"),
		name:      o.Link,
		blackhole: o.Blackhole,
		kernel:    newNetlink(),
		sysctl:    o.Sysctl,
		metrics:   newMetrics(o.Registerer),
		now:       time.Now,
		changed:   make(chan struct{}, 1),
		held:      map[netip.Addr]bool{},
		holes:     map[netip.Addr]time.Time{},
	}
}

// ErrForeign is in the error of Apply when the link's name is taken by a link that is not ours.
var ErrForeign = errors.New("link is not ours")

// Apply makes the link hold the VIPs of want and no other address, and returns what it holds now, sorted, also beside
// an error. A VIP that goes leaves a blackhole route for Options.Blackhole; the first Apply after NextExpiry takes it
// away. After the first call, and until Resync, only the difference to the call before is sent to the kernel.
//
// A VIP that another link holds too is added all the same, and is a Problem: the kernel takes packets for it either
// way, and the VIP must not vanish when the other link's address does.
func (l *Links) Apply(ctx context.Context, want []ravel.Addr) (held []netip.Addr, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer func() {
		l.last = l.now()
		held = l.heldLocked()
		l.metrics.vips.WithLabelValues("desired").Set(float64(len(want)))
		l.metrics.vips.WithLabelValues("held").Set(float64(len(held)))
	}()
	if l.watch == nil && !l.closed {
		l.watch = newWatch(l)
	}
	wanted := make(map[netip.Addr]bool, len(want))
	for _, a := range want {
		wanted[a.VIP] = true
	}
	// The link may go behind our back at any moment; then what was known is void, and one more look is enough.
	for range 2 {
		err = l.applyLocked(ctx, wanted)
		if !errors.Is(err, errNoLink) {
			break
		}
		l.known = false
	}
	if err == nil && !l.swept {
		if err = l.sweepLocked(); err == nil {
			l.swept = true
		}
	}
	return nil, err
}

// sweepLocked deletes the links that runs under other names of it left, once this one holds what is wanted. What the two
// hold both is held throughout.
func (l *Links) sweepLocked() error {
	names, err := l.kernel.aliased()
	if err != nil {
		return fmt.Errorf("reading links: %w", err)
	}
	var errs []error
	for _, name := range names {
		found, err := l.kernel.link(name)
		if name == l.name || errors.Is(err, errNoLink) || err == nil && !found.ours() {
			continue
		}
		if err == nil {
			err = l.kernel.delLink(found.index)
		}
		if err != nil && !errors.Is(err, errNoLink) {
			errs = append(errs, fmt.Errorf("deleting link %s of a run with another name: %w", name, err))
			continue
		}
		l.log.Info("link of a run with another name deleted", "link", name)
	}
	return errors.Join(errs...)
}

func (l *Links) applyLocked(ctx context.Context, want map[netip.Addr]bool) error {
	if !l.known {
		if err := l.readLocked(len(want) > 0); err != nil {
			return err
		}
	}
	if len(want) > 0 && l.index == 0 {
		if err := l.makeLocked(); err != nil {
			return err
		}
	}
	l.twice = map[netip.Addr]string{}
	for a := range want {
		if link, there := l.elsewhere[a]; there {
			l.twice[a] = link
		}
	}
	var errs []error
	diff := setdiff.Maps(l.held, want, netip.Addr.Compare, func(a, b bool) bool { return true })
	for _, a := range diff.Add {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if err := l.kernel.addAddr(l.index, a); err != nil {
			errs = append(errs, fmt.Errorf("adding %s to %s: %w", a, l.name, err))
			continue
		}
		l.held[a] = true
		l.log.Info("VIP added", "vip", a, "link", l.name)
	}
	for _, a := range diff.Remove {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		// The route first: between the two the local table, which holds the address, is asked before it.
		if err := l.kernel.addHole(a); err != nil {
			errs = append(errs, fmt.Errorf("adding a blackhole route for %s: %w", a, err))
			continue
		}
		l.holes[a] = l.now().Add(l.blackhole)
		if err := l.kernel.delAddr(l.index, a); err != nil {
			errs = append(errs, fmt.Errorf("removing %s from %s: %w", a, l.name, err))
			continue
		}
		delete(l.held, a)
		l.log.Info("VIP removed", "vip", a, "link", l.name)
	}
	now := l.now()
	for a, due := range l.holes {
		if now.Before(due) && !l.held[a] {
			continue
		}
		// An address that did not go keeps its route: it is tried again with the address.
		if l.held[a] && !want[a] {
			continue
		}
		if err := l.kernel.delHole(a); err != nil {
			errs = append(errs, fmt.Errorf("removing the blackhole route for %s: %w", a, err))
			continue
		}
		delete(l.holes, a)
	}
	return errors.Join(errs...)
}

// readLocked learns what the kernel holds. needed says that the settings for VIPs have to be made.
func (l *Links) readLocked(needed bool) error {
	found, err := l.kernel.link(l.name)
	l.foreign = nil
	switch {
	case errors.Is(err, errNoLink):
		found.index = 0
	case err != nil:
		return fmt.Errorf("reading link %s: %w", l.name, err)
	case !found.ours():
		if needed {
			l.index, l.held = 0, map[netip.Addr]bool{}
			return l.foreignLocked(found)
		}
		found.index = 0
	}
	all, err := l.kernel.addrs()
	if err != nil {
		return fmt.Errorf("reading addresses: %w", err)
	}
	held, elsewhere := map[netip.Addr]bool{}, map[netip.Addr]string{}
	for _, a := range all {
		if found.index != 0 && a.index == found.index {
			held[a.addr] = true
		} else {
			elsewhere[a.addr] = a.link
		}
	}
	routes, err := l.kernel.holes()
	if err != nil {
		return fmt.Errorf("reading blackhole routes: %w", err)
	}
	holes := map[netip.Addr]time.Time{}
	for _, a := range routes {
		due, known := l.holes[a]
		if !known {
			// Nobody knows any more when the VIP went, so it gets the whole time again.
			due = l.now().Add(l.blackhole)
		}
		holes[a] = due
	}
	if l.before {
		drift := setdiff.Maps(l.held, held, netip.Addr.Compare, func(a, b bool) bool { return true })
		if n := len(drift.Add) + len(drift.Remove); n > 0 {
			l.metrics.drift.Add(float64(n))
			l.log.Warn("addresses changed behind our back", "link", l.name, "lost", drift.Remove, "found", drift.Add)
		}
	}
	l.index, l.held, l.elsewhere, l.holes = found.index, held, elsewhere, holes
	if needed {
		l.settingsLocked()
		if found.index != 0 {
			if err := l.readyLocked(found); err != nil {
				return err
			}
		}
	}
	l.known, l.before = true, true
	return nil
}

// foreignLocked notes that the link is not ours and returns the error for it.
func (l *Links) foreignLocked(found link) error {
	l.foreign = &ravel.Problem{
		Where: "link " + l.name,
		What:  fmt.Sprintf("is a %s with the alias %q, which Ravel did not make; no VIP is held", found.kind, found.alias),
		Fix:   fmt.Sprintf("ip link delete %s, or set another name for Ravel's", l.name),
	}
	return fmt.Errorf("link %s, a %s with the alias %q: %w", l.name, found.kind, found.alias, ErrForeign)
}

// makeLocked makes the link.
func (l *Links) makeLocked() error {
	l.settingsLocked()
	if err := l.kernel.addLink(l.name); err != nil && !errors.Is(err, errExists) {
		return fmt.Errorf("making dummy link %s: %w", l.name, err)
	}
	found, err := l.kernel.link(l.name)
	if err != nil {
		return fmt.Errorf("reading link %s: %w", l.name, err)
	}
	if !found.ours() {
		l.known = false
		return l.foreignLocked(found)
	}
	if err := l.readyLocked(found); err != nil {
		return err
	}
	l.index = found.index
	l.log.Info("link made", "link", l.name)
	return nil
}

// Prepare makes the link and the host's settings ready, as Apply does before the first VIP, for a process that will not
// have the right to make settings. It adds and removes no address. Problems tells what could not be set.
func (l *Links) Prepare() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.known = false
	if err := l.readLocked(true); err != nil || l.index != 0 {
		return err
	}
	return l.makeLocked()
}

// readyLocked gives our link its alias and sets it up.
func (l *Links) readyLocked(found link) error {
	if found.alias != alias {
		if err := l.kernel.setAlias(found.index); err != nil {
			return fmt.Errorf("giving %s its alias: %w", l.name, err)
		}
	}
	if found.up {
		return nil
	}
	if err := l.kernel.setUp(found.index); err != nil {
		return fmt.Errorf("setting %s up: %w", l.name, err)
	}
	return nil
}

// settingsLocked makes the settings that keep VIPs quiet. The kernel takes the larger of "all" and the link's own, so
// "all" is enough, and raising it takes nothing from a link that has more. arp_ignore is read on the link that a
// request comes in by, which is none of ours. rp_filter is left alone: packets for a VIP come in by other links from
// sources that these already judge, and none comes in by a dummy. IPv6 needs nothing: a solicitation is answered only
// for an address of the link that it came in by.
func (l *Links) settingsLocked() {
	l.sysctls = nil
	for _, s := range []struct {
		name  string
		value int
	}{
		{"net/ipv4/conf/all/arp_ignore", 1},   // answer only for addresses of the link asked on
		{"net/ipv4/conf/all/arp_announce", 2}, // never ask in the name of a VIP
	} {
		if err := l.sysctl.SetAtLeast(s.name, s.value); err != nil {
			l.sysctls = append(l.sysctls, ravel.Problem{
				Where: "sysctl " + s.name,
				What:  fmt.Sprintf("cannot be set, so that this host may answer ARP for VIPs: %v", err),
				Fix:   fmt.Sprintf("sysctl -w %s=%d on the host, or all that is to be set: ravel check --host --fix before this starts", s.name, s.value),
			})
		}
	}
}

// heldLocked returns the addresses on the link, sorted.
func (l *Links) heldLocked() []netip.Addr {
	held := make([]netip.Addr, 0, len(l.held))
	for a := range l.held {
		held = append(held, a)
	}
	slices.SortFunc(held, netip.Addr.Compare)
	return held
}

// NextExpiry returns when the next blackhole route is due to go, for the caller to call Apply again then. It is never
// within a second of the last Apply, so that one that keeps failing does not make a busy loop.
func (l *Links) NextExpiry() (time.Time, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var next time.Time
	for _, due := range l.holes {
		if next.IsZero() || due.Before(next) {
			next = due
		}
	}
	if next.IsZero() {
		return next, false
	}
	if soonest := l.last.Add(time.Second); next.Before(soonest) {
		next = soonest
	}
	return next, true
}

// Resync makes the next Apply read the kernel again, and mend what others changed.
func (l *Links) Resync() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.known = false
}

// Problems returns what stands in the way of VIPs, as of the last Apply.
func (l *Links) Problems() []ravel.Problem {
	l.mu.Lock()
	defer l.mu.Unlock()
	problems := slices.Clone(l.sysctls)
	if l.foreign != nil {
		problems = append(problems, *l.foreign)
	}
	twice := make([]netip.Addr, 0, len(l.twice))
	for a := range l.twice {
		twice = append(twice, a)
	}
	slices.SortFunc(twice, netip.Addr.Compare)
	for _, a := range twice {
		problems = append(problems, ravel.Problem{
			Where: "VIP " + a.String(),
			What:  fmt.Sprintf("link %s holds it too, so that this host answers ARP or solicitations for it there", l.twice[a]),
			Fix:   fmt.Sprintf("ip addr del %s dev %s", netip.PrefixFrom(a, a.BitLen()), l.twice[a]),
		})
	}
	return problems
}

// Cleanup removes every link of ours, whatever its name, and every blackhole route of ours, and returns what it did, or
// with dryRun what it would do, in the words of ip. A link that is not ours stays. Settings are the sysctl package's to put back, after this.
func (l *Links) Cleanup(ctx context.Context, dryRun bool) ([]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.known, l.before = false, false
	var did []string
	var errs []error
	names, err := l.kernel.aliased()
	if err != nil {
		errs = append(errs, fmt.Errorf("reading links: %w", err))
	}
	// One of our name may lack its alias yet.
	names = append(names, l.name)
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		found, err := l.kernel.link(name)
		switch {
		case errors.Is(err, errNoLink):
		case err != nil:
			errs = append(errs, fmt.Errorf("reading link %s: %w", name, err))
		case found.ours():
			did = append(did, "ip link delete "+name)
			if dryRun {
				break
			}
			if err := l.kernel.delLink(found.index); err != nil && !errors.Is(err, errNoLink) {
				errs = append(errs, fmt.Errorf("deleting link %s: %w", name, err))
			}
		}
	}
	routes, err := l.kernel.holes()
	if err != nil {
		errs = append(errs, fmt.Errorf("reading blackhole routes: %w", err))
	}
	slices.SortFunc(routes, netip.Addr.Compare)
	for _, a := range routes {
		if err := ctx.Err(); err != nil {
			return did, errors.Join(append(errs, err)...)
		}
		did = append(did, fmt.Sprintf("ip route delete blackhole %s proto %d", a, ravel.RouteProtocol))
		if dryRun {
			continue
		}
		if err := l.kernel.delHole(a); err != nil {
			errs = append(errs, fmt.Errorf("removing the blackhole route for %s: %w", a, err))
		}
	}
	return did, errors.Join(errs...)
}
