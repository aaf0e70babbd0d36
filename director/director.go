// Package director keeps the kernel's IPVS table as it should be: a list of virtual services in, edits in place out.
//
// # What is ours
//
// Ownership lies in the kernel itself, so that it survives the process, its files and its host name. Every service
// that this package makes carries the flag 0x20 (ravel.Flag3, IP_VS_SVC_F_SCHED3), the third of the three bits that
// are left to schedulers and the one that no scheduler of the kernel reads. ipvsadm shows it as flag-3, but not for mh
// and sh, whose flags it shows by their own names only; so what ipvsadm saves and restores, or edits, is not ours any
// more.
// A service without the flag, and every service by firewall mark, is foreign: it is never changed and never removed.
// Where a wanted service exists already as a foreign one, that is a Problem, and the service is not held; unless it is to
// be taken over (Options.Adopt). The flag is
// read again before a service is edited or removed, so that a foreign one which took the place of ours is safe too.
//
// It follows that Flag3 has no meaning of its own in VirtualService.Flags: it is always set in the kernel, whether it
// was asked for or not, and Read leaves it out.
//
// # What it guarantees
//
// Apply does only the difference between what it last read from the kernel and what is wanted. Real servers are added
// and raised before others are lowered and removed, so that a service that takes new flows before and after a change
// takes them all the while. A new service gets its real servers before its scheduler, so that the Maglev table is built
// once; if the process dies in between, the next start binds the scheduler.
//
// Whatever the kernel's history, equal lists that are wanted give equal Maglev tables (ip_vs_mh.c), which come from:
//
//   - The order of the kernel's list: it becomes that of the wanted one. The kernel puts a new real server at the head,
//     and the only way to another place is to take one out and add it again. That is done to as few as can be: to those
//     that stand before the longest tail of the wanted list that is in order already. Its open flows go on, for the
//     kernel keeps a removed real server while it has flows and takes the same one back; what they send in between, a
//     fraction of a millisecond, is lost.
//   - Last weights: a real server wanted with weight 0 is given its last weight first. The kernel does not tell last
//     weights, so those of real servers that a process finds at weight 0 when it first reads the table are given again,
//     once. One that should own no slot and may is taken out and added again. New flows are held back meanwhile, because
//     they would go where they must not (Options.HoldBack).
//
// Services with another scheduler have no such table: nothing is added again there, and their order is history's.
//
// A flow of UDP has no end that IPVS sees, so a real server that is removed from a UDP service takes its flows along:
// they go on elsewhere. This leaves re-added ones alone; see expire.go.
package director

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/sysctl"
)

// Options are what a Director needs of its surroundings.
type Options struct {
	Log        *slog.Logger          // nil logs nothing
	Registerer prometheus.Registerer // nil counts without showing
	Sysctl     *sysctl.Setter        // nil leaves the kernel's settings as they are

	// HoldBack drops new flows of a service until release is called, so that clients send their SYN again, for moments
	// in which the kernel would refuse them or send them where they must not go: while the scheduler of a service
	// changes, for there is none; while a real server that shall have weight 0 is given its last weight; while the only
	// one that takes new flows is added again. Of one service in one Apply that is one moment, some tenths of a
	// millisecond for each edit. It is called for nothing else, and must not call the Director. An error is a Problem and
	// stops nothing. nil holds nothing back.
	HoldBack func(ravel.ServiceKey) (release func(), err error)

	// Unbound makes that moment longer, for tests: the service is without a scheduler for this time at least.
	Unbound time.Duration

	// CountPackets has the kernel count flows, packets and bytes of each service and real server (run_estimation=1).
	// Up to Linux 6.1 it then walks them all every 2 s in one go, on every CPU, which delays packets.
	CountPackets bool

	// Adopt takes over services of wanted keys that another program made, with their real servers and open flows, if they
	// forward directly or by tunnels: those of a load balancer that Ravel takes the place of. That program must have ended.
	Adopt bool

	open     func() (kernel, error) // nil opens the kernel of this network namespace
	routes   routes                 // nil asks the kernel
	expiring time.Duration          // 0 is the time expiring
}

// ErrUnknown is in the error of an Apply that cannot say what the kernel holds: it could not read its table, or ctx
// ended. That is not the same as holding nothing.
var ErrUnknown = errors.New("what IPVS holds is not known")

// ErrClosed is returned by the methods of a Director that was closed.
var ErrClosed = errors.New("the director is closed")

// Director programs IPVS. Its methods are safe for many goroutines; what they ask of the kernel is done one after the
// other by one goroutine, because a netlink handle is not.
type Director struct {
	log      *slog.Logger
	sysctl   *sysctl.Setter
	holdBack func(ravel.ServiceKey) (func(), error)
	unbound  time.Duration
	count    bool
	adopts   bool
	expiring time.Duration
	open     func() (kernel, error)
	metrics  *metrics
	reach    *reach

	requests chan request
	life     context.Context // ends with Close
	stop     context.CancelFunc
	done     sync.WaitGroup
	resync   atomic.Bool

	tableSize atomic.Int64

	mu       sync.Mutex // guards the fields below
	problems []ravel.Problem
	foreign  []ravel.ServiceKey // of the last read, sorted

	// The fields below belong to the goroutine that runs run.
	handle  kernel
	table   *table // what the kernel held at the last read, with what was done since
	fresh   bool   // the table can be relied on
	tuned   bool   // the settings were looked at since the last resync
	sysctls []ravel.Problem
	applied map[ravel.ServiceKey]*applied
	order   []*applied // those of them that the last pass wanted, as it wanted them
	round   uint64     // counts passes
	expired time.Time  // when the kernel was last made to expire flows
	told    digests
}

// New starts a Director. It does nothing to the kernel before the first call of another method. Close ends it.
func New(o Options) (*Director, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.open == nil {
		o.open = open
	}
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, err
	}
	reach, err := newReach(o.routes, o.Log)
	if err != nil {
		m.unregister(o.Registerer)
		return nil, err
	}
	life, stop := context.WithCancel(context.Background())
	d := &Director{
		log: o.Log, sysctl: o.Sysctl, holdBack: o.HoldBack, unbound: o.Unbound, count: o.CountPackets, adopts: o.Adopt,
		expiring: cmp.Or(o.expiring, expiring), open: o.open,
		metrics: m, reach: reach,
		requests: make(chan request), life: life, stop: stop,
		table: newTable(), applied: map[ravel.ServiceKey]*applied{},
		told: digests{
			services: map[ravel.ServiceKey]ravel.ServiceReport{}, uses: map[netip.Addr][]ravel.ServiceKey{},
			addrs: map[ravel.ServiceKey][]netip.Addr{}, old: map[ravel.ServiceKey]bool{}, all: true,
		},
	}
	d.done.Go(d.run)
	return d, nil
}

// Close ends the Director's goroutines and waits for them. The kernel's table stays as it is.
func (d *Director) Close() error {
	d.stop()
	d.done.Wait()
	d.reach.close()
	return nil
}

// Changed receives a value, at most one at a time, when packets to a real server would leave this host in another way
// than they did when an Apply asked: the next Apply forwards accordingly. Events of links, addresses and routes that
// change no such way tell nothing; those that do are told 100 ms after the first of them.
func (d *Director) Changed() <-chan struct{} { return d.reach.changed }

// Resync makes the next Apply read the whole of the kernel's table and settings again, in case that somebody else
// changed them.
func (d *Director) Resync() { d.resync.Store(true) }

// Problems returns what the last Apply could not do as asked, and which settings of the kernel are not as they should
// be.
func (d *Director) Problems() []ravel.Problem {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.problems)
}

// Foreign returns the keys of the services in IPVS that are not ours, sorted, as they were when the whole table was
// last read: by Read, by the first Apply, and by one after Resync or after something failed. Packets to them are none of
// our business. Services by firewall mark have no key and are not among them. It asks nothing of the kernel.
func (d *Director) Foreign() []ravel.ServiceKey {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.foreign)
}

// readTable reads the whole of the kernel's table, and tells Foreign.
func (d *Director) readTable(k kernel) (*table, error) {
	now, err := readTable(k, d.table)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.foreign = sortedKeys(now.foreign)
	return now, nil
}

// request is one piece of work for the goroutine that owns the handle.
type request struct {
	ctx  context.Context
	do   func(context.Context, kernel) error
	done chan error
}

// call has do done by the goroutine that owns the handle, and waits for it or for ctx. Unless it is finished do may run
// still: the caller must not look at what it writes.
func (d *Director) call(ctx context.Context, do func(context.Context, kernel) error) (finished bool, err error) {
	r := request{ctx, do, make(chan error, 1)}
	select {
	case <-d.life.Done():
		return false, ErrClosed
	case <-ctx.Done():
		return false, ctx.Err()
	case d.requests <- r:
	}
	select {
	case <-ctx.Done():
		return false, ctx.Err()
	case err := <-r.done:
		return true, err
	}
}

// run owns the handle until Close.
func (d *Director) run() {
	for {
		select {
		case <-d.life.Done():
			if d.handle != nil {
				d.handle.Close()
			}
			return
		case r := <-d.requests:
			r.done <- d.serve(r)
		}
	}
}

// serve does one request. The handle waits for ever for an answer of the kernel, so it is closed under the request
// when ctx ends; the next request opens another.
func (d *Director) serve(r request) error {
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	defer context.AfterFunc(d.life, cancel)()
	if d.handle == nil {
		handle, err := d.open()
		if err != nil {
			return err
		}
		d.handle, d.fresh = handle, false
	}
	keep := context.AfterFunc(ctx, d.handle.Close)
	err := r.do(ctx, d.handle)
	if !keep() {
		d.handle = nil
	}
	return err
}
