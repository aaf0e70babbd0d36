package director

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

// errStale says that the kernel does not hold what we remember of it.
var errStale = errors.New("changed by somebody else")

// errModule says that the kernel has not the scheduler of a service.
var errModule = errors.New("the kernel has no such scheduler")

// applied is a service that the kernel holds wholly as it was wanted.
type applied struct {
	want     ravel.VirtualService
	routes   uint64 // the generation of routes that forwarding was chosen by
	problems []ravel.Problem
	round    uint64 // the pass over all services that last wanted it
}

// Apply makes the kernel's services of ours those of want, and returns the keys of those of want that the kernel then
// serves, in want's order: it holds them as ours, with a scheduler, and with a real server if any is wanted. A service
// of which an edit failed is among them, for the kernel serves it on as before; that it is not wholly as wanted is in
// the error or in Problems. One that is absent, foreign or without a scheduler is not.
//
// Where a real server must be added again within a second after flows of UDP were expired, Apply waits for the rest of
// that, when all else is done.
//
// want is not changed and must not change while the Director lives; a key that is in it twice counts the first time.
// Where something cannot be done the rest is done all the same; the errors are joined, and what is in want at fault is
// in Problems.
//
// Where it is not known what the kernel holds, the error is ErrUnknown and there are no keys. So it is when ctx ends:
// Apply returns at once, though the kernel may be at work still.
func (d *Director) Apply(ctx context.Context, want []ravel.VirtualService) (held []ravel.ServiceKey, err error) {
	start := time.Now()
	a := &applying{Director: d}
	finished, err := d.call(ctx, func(ctx context.Context, k kernel) error {
		a.ctx, a.kernel = ctx, k
		return a.run(want)
	})
	d.metrics.applied(start, err)
	if !finished {
		return nil, fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case errors.Is(err, errNoIPVS):
		d.problems = []ravel.Problem{{Where: "ip_vs", What: "this kernel has no IPVS; nothing can be served", Fix: "modprobe ip_vs"}}
		return nil, err
	case !a.known:
		return nil, fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	d.problems = a.problems()
	return a.held, err
}

// applying is one Apply under way.
type applying struct {
	*Director
	ctx    context.Context
	kernel kernel
	held   []ravel.ServiceKey
	known  bool            // held is what the kernel serves
	host   []ravel.Problem // of the kernel's settings
	faults []ravel.Problem // of services
	stale  bool            // the kernel is not what the table says
	unsure bool            // the kernel may not be what the table says
	reals  [2]int          // real servers desired and held

	leaving []leaving // what is done last
	later   bool      // a service has to wait
}

func (a *applying) run(want []ravel.VirtualService) error {
	if a.resync.Swap(false) {
		a.tuned = false
		a.reach.resync()
		if err := a.read(true); err != nil {
			a.resync.Store(true)
			return err
		}
	}
	if !a.tuned {
		a.sysctls, a.tuned = tune(a.sysctl, a.count, len(a.Foreign()) > 0), true
	}
	a.host = slices.Clip(a.sysctls)
	var err error
	for range 2 {
		if !a.fresh {
			if err := a.read(false); err != nil {
				return err
			}
		}
		if err = a.edit(want); a.later && !a.stale {
			if err = a.wait(); err == nil {
				err = a.edit(want)
			}
		}
		if !a.stale {
			break
		}
		a.fresh = false
	}
	if a.unsure {
		a.fresh = false
	}
	a.metrics.show(len(want), len(a.held), a.reals)
	a.known = err == nil || a.ctx.Err() == nil
	return err
}

// read reads the kernel's table. With count, what differs from what is remembered is counted as drift.
func (a *applying) read(count bool) error {
	now, err := a.readTable(a.kernel)
	if err != nil {
		return err
	}
	if count && a.fresh {
		if n := drift(a.table, now); n > 0 {
			a.metrics.drift.Add(float64(n))
			a.log.Warn("IPVS was changed by somebody else", "services", n)
		}
	}
	a.table, a.fresh = now, true
	a.told.all = true
	clear(a.applied)
	a.order = nil
	return nil
}

// edit goes over all services once. It looks twice only at those that are not as they were in the last pass.
func (a *applying) edit(want []ravel.VirtualService) error {
	a.held, a.faults, a.stale, a.reals = make([]ravel.ServiceKey, 0, len(want)), nil, false, [2]int{}
	a.leaving, a.later = nil, false
	a.round++
	before := a.order
	a.order = make([]*applied, 0, len(want))
	routes := a.reach.generation()
	refused := map[ravel.ServiceKey]bool{} // not wholly as wanted
	var errs []error
	for n, v := range want {
		var was *applied
		if n < len(before) && before[n].want.Key == v.Key {
			was = before[n]
		} else {
			was = a.applied[v.Key]
		}
		if was != nil && was.round == a.round || refused[v.Key] {
			a.faults = append(a.faults, ravel.Problem{Where: v.Key.String(), What: "is wanted twice; the first counts"})
			continue
		}
		a.reals[0] += len(v.RealServers)
		if was == nil || was.routes != routes || !alike(was.want, v) {
			if err := a.ctx.Err(); err != nil {
				return join(append([]error{err}, errs...))
			}
			problems, whole, err := a.service(v)
			if errors.Is(err, errLater) {
				a.later, err = true, nil
			}
			if err != nil {
				errs = append(errs, err)
			}
			if !whole {
				delete(a.applied, v.Key)
				refused[v.Key] = true
				a.faults = append(a.faults, problems...)
				if a.serves(v, err != nil) {
					a.reals[1] += a.table.ours[v.Key].count(v)
					a.held = append(a.held, v.Key)
				}
				continue
			}
			was = &applied{routes: routes, problems: problems}
			a.applied[v.Key] = was
		}
		was.want, was.round = v, a.round
		a.order = append(a.order, was)
		a.faults = append(a.faults, was.problems...)
		a.reals[1] += len(v.RealServers)
		a.held = append(a.held, v.Key)
	}
	errs = append(errs, a.expire(refused)...)
	a.reach.keep(want)
	a.reach.release(want)
	if len(refused) == 0 && len(a.held) == len(a.table.ours) {
		return join(errs)
	}
	for _, key := range sortedKeys(a.table.ours) {
		if was := a.applied[key]; was != nil && was.round == a.round || refused[key] {
			continue
		}
		if err := a.remove(key); err != nil {
			errs = append(errs, err)
		}
	}
	return join(errs)
}

// join joins the first few errors and counts the others: one fault may be that of every real server of every service.
func join(errs []error) error {
	const few = 5
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if more := len(errs) - few; more > 0 {
		errs = append(errs[:few:few], fmt.Errorf("and %d more like these", more))
	}
	return errors.Join(errs...)
}

// alike reports whether two services are the same to IPVS.
func alike(a, b ravel.VirtualService) bool {
	return a.Scheduler == b.Scheduler && a.Flags|ravel.Flag3 == b.Flags|ravel.Flag3 && a.OnePacket == b.OnePacket &&
		a.UpperThreshold == b.UpperThreshold && a.LowerThreshold == b.LowerThreshold && slices.Equal(a.RealServers, b.RealServers)
}

// problems returns all that is known to be wrong, each once.
func (a *applying) problems() []ravel.Problem {
	seen := map[ravel.Problem]bool{}
	return slices.DeleteFunc(slices.Concat(a.host, a.faults), func(p ravel.Problem) bool {
		again := seen[p]
		seen[p] = true
		return again
	})
}

// serves reports whether the kernel serves a service that is not wholly as wanted. With ask, an edit of it failed, and
// what that left is asked of the kernel; if it does not answer, what was last known counts.
func (a *applying) serves(v ravel.VirtualService, ask bool) bool {
	have := a.table.ours[v.Key]
	if have == nil || len(have.reals) == 0 && len(v.RealServers) > 0 {
		return false
	}
	if ask {
		switch s, err := a.kernel.GetService(id{ServiceKey: v.Key}.request()); {
		case errors.Is(err, unix.ESRCH):
			return false
		case err == nil:
			return isOurs(s) && s.SchedName != none
		}
	}
	return have.scheduler != none
}

// service makes the kernel hold one service, and says whether it holds it wholly as wanted.
func (a *applying) service(v ravel.VirtualService) (problems []ravel.Problem, whole bool, err error) {
	if v.AsIs {
		return nil, false, nil // what it should be is not known yet, so it is looked at again each time
	}
	if problems := faults(v); len(problems) > 0 {
		return problems, false, nil
	}
	if a.table.foreign[v.Key] {
		if !a.adopts {
			return []ravel.Problem{foreign(v.Key)}, false, nil
		}
		if adopted, problems, err := a.adopt(v); !adopted {
			return problems, false, err
		}
	}
	var asked error
	inUse := a.inUse(v.Key, &asked)
	want := targetOf(v, func(rs ravel.RealServer) uint32 {
		method, p := a.reach.method(rs)
		if p != nil {
			problems = append(problems, *p)
		}
		old, changes := a.changes(v.Key, rs.Addr, method)
		if !changes || !a.reach.ask(rs.Addr).onLink {
			return method // what went directly to one that is no more on-link is lost either way
		}
		err := a.reach.keepsWay(rs.Addr)
		if err == nil || !inUse(rs.Addr) {
			return method
		}
		problems = append(problems, ravel.Problem{
			Where: "real server " + rs.Addr.String(),
			What:  fmt.Sprintf("is forwarded to for %s as before until its open flows have ended: %v", v.Key, err),
			Fix:   "nothing; or drain it, to change sooner",
		})
		return old
	})
	if asked != nil {
		return problems, false, fmt.Errorf("asking for the flows of %s: %w", v.Key, asked)
	}
	err = a.make(v.Key, want)
	if errors.Is(err, errModule) {
		problems = append(problems, ravel.Problem{
			Where: v.Key.String(),
			What:  fmt.Sprintf("the kernel has no scheduler %s; the service is not as it should be", v.Scheduler),
			Fix:   "modprobe ip_vs_" + string(v.Scheduler),
		})
	}
	return problems, err == nil, err
}

// changes returns how a real server of a service is forwarded to, if that is by another method than this one.
func (a *applying) changes(key ravel.ServiceKey, addr netip.Addr, method uint32) (old uint32, changes bool) {
	have := a.table.ours[key]
	if have == nil {
		return 0, false
	}
	at := have.find(netip.AddrPortFrom(addr, key.Port))
	if at < 0 || have.reals[at].method == method {
		return 0, false
	}
	return have.reals[at].method, true
}

// inUse returns a function that reports whether flows to a real server are open. The kernel is asked once, and only where
// the answer matters; failed gets its error.
func (a *applying) inUse(key ravel.ServiceKey, failed *error) func(netip.Addr) bool {
	var open map[netip.Addr]bool
	return func(addr netip.Addr) bool {
		if open == nil {
			open = map[netip.Addr]bool{}
			var list []*ipvs.Destination
			list, *failed = a.kernel.GetDestinations(id{ServiceKey: key}.request())
			for _, d := range list {
				if rs, bad := addrOf(d.Address); bad == nil && d.Port == key.Port {
					open[rs] = d.ActiveConnections+d.InactiveConnections > 0
				}
			}
		}
		return open[addr]
	}
}

// make does what the kernel's service lacks: real servers first, then the settings and with them the scheduler.
func (a *applying) make(key ravel.ServiceKey, want service) error {
	i := id{ServiceKey: key}
	have, there := a.table.ours[key]
	if !there {
		bare := want
		bare.scheduler, bare.reals = none, nil
		a.told.touch(key, nil)
		if err := a.do(addService, i.String(), func() error { return a.kernel.NewService(i.full(bare)) }); err != nil {
			return err
		}
		have = &bare
		a.table.ours[key] = have
		a.log.Info("virtual service added", "service", key.String(), "scheduler", want.scheduler)
	}
	m := &making{applying: a, id: i, have: have, want: want, made: !there}
	defer m.release()
	if err := m.servers(); err != nil {
		return err
	}
	if !have.sameSettings(want) {
		if err := m.settings(); err != nil {
			m.errs = append([]error{err}, m.errs...)
		}
	}
	return join(m.errs)
}

// remove removes a service of ours with its real servers.
func (a *applying) remove(key ravel.ServiceKey) error {
	i := id{ServiceKey: key}
	if err := a.confirm(i); err != nil {
		return err
	}
	if err := a.do(delService, i.String(), func() error { return a.kernel.DelService(i.request()) }); err != nil {
		return err
	}
	delete(a.table.ours, key)
	delete(a.applied, key)
	a.told.touch(key, nil)
	a.log.Info("virtual service removed", "service", key.String())
	return nil
}

// confirm asks the kernel whether a service is ours still.
func (a *applying) confirm(i id) error {
	if err := a.ctx.Err(); err != nil {
		return err
	}
	s, err := a.kernel.GetService(i.request())
	switch {
	case errors.Is(err, unix.ESRCH):
		a.stale = true
		return fmt.Errorf("reading %s: %w", i, errStale)
	case err != nil:
		return fmt.Errorf("reading %s: %w", i, err)
	case !isOurs(s):
		a.stale = true
		return fmt.Errorf("reading %s: %w", i, errStale)
	}
	return nil
}

// do makes one request of the kernel, unless ctx has ended.
func (a *applying) do(op operation, what string, request func() error) error {
	err := a.ctx.Err()
	if err == nil {
		err = translate(op, request())
		a.metrics.operation(op, err)
	}
	if err == nil {
		a.log.Debug("IPVS changed", "operation", string(op), "what", what)
		return nil
	}
	a.stale = a.stale || errors.Is(err, errStale)
	a.unsure = a.unsure || !errors.Is(err, errModule)
	return fmt.Errorf("%s %s: %w", verbs[op], what, err)
}

var verbs = map[operation]string{
	addService: "adding", editService: "setting", delService: "removing",
	addReal: "adding", editReal: "setting", delReal: "removing",
}

// translate tells what an errno of the kernel means to an operation: see kernel.
func translate(op operation, err error) error {
	switch {
	case errors.Is(err, unix.ESRCH),
		errors.Is(err, unix.EEXIST) && (op == addService || op == addReal),
		errors.Is(err, unix.ENOENT) && (op == editReal || op == delReal):
		return fmt.Errorf("%w: %w", errStale, err)
	case errors.Is(err, unix.ENOENT) && (op == addService || op == editService):
		return fmt.Errorf("%w: %w", errModule, err)
	}
	return err
}
