package director

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/maglev"
)

// digests are what Digests last told, which is never changed after, and of which services that may be out of date. They
// belong to the goroutine that owns the handle.
type digests struct {
	size     int // of the kernel's Maglev tables
	services map[ravel.ServiceKey]ravel.ServiceReport
	uses     map[netip.Addr][]ravel.ServiceKey
	addrs    map[ravel.ServiceKey][]netip.Addr // of uses, sorted
	old      map[ravel.ServiceKey]bool
	all      bool // all are old
}

// touch says that a service is about to be changed.
func (d *digests) touch(key ravel.ServiceKey, s *service) {
	d.old[key] = true
	if s != nil {
		s.dumped = false
	}
}

// SetTableSize says how many slots the kernel's Maglev tables have; Digests knows no table before it is told.
func (d *Director) SetTableSize(slots int) { d.tableSize.Store(int64(slots)) }

// Digests returns, of each service of ours, hashes of what the kernel holds (internal/maglev), and of each address of a
// real server the services whose list has it, sorted. What is returned is never changed; where nothing changed it is
// the same as before.
//
// It is all read back from the kernel: each service when it was changed since, and all of them by the Apply after
// Resync, by the first one and by one that follows a failure. Only the last weights of real servers with weight 0, which
// the kernel does not tell, are those that they were given. Table is 0 while one of these is not known, without a table
// size, and for a service that is not mh's: it has no table to agree on. Wish is 0: it is not the kernel's.
//
// A service that is found changed by somebody else is mended by the next Apply.
func (d *Director) Digests(ctx context.Context) (
	services map[ravel.ServiceKey]ravel.ServiceReport, uses map[netip.Addr][]ravel.ServiceKey, err error,
) {
	finished, err := d.call(ctx, func(ctx context.Context, k kernel) error {
		a := &applying{Director: d, ctx: ctx, kernel: k}
		if !d.fresh {
			if err := a.read(false); err != nil {
				return err
			}
		}
		if err := a.digest(); err != nil {
			return err
		}
		services, uses = d.told.services, d.told.uses
		return nil
	})
	if !finished || err != nil {
		return nil, nil, err
	}
	return services, uses, nil
}

// digest brings up to date what may be out of it.
func (a *applying) digest() error {
	t := &a.told
	if size := int(a.tableSize.Load()); size != t.size {
		t.size, t.all = size, true
	}
	if t.all {
		for key := range a.table.ours {
			t.old[key] = true
		}
		for key := range t.services {
			t.old[key] = true
		}
		t.all = false
	}
	if len(t.old) == 0 {
		return nil
	}
	services, moved := maps.Clone(t.services), map[netip.Addr]bool{}
	changed := false
	for key := range t.old {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		if s := a.table.ours[key]; s != nil && !s.dumped {
			if err := a.dump(key); err != nil {
				return err
			}
		}
		was, there := services[key]
		s := a.table.ours[key]
		if s == nil {
			delete(services, key)
			changed = changed || there
		} else if now := t.report(key, *s); now != was || !there {
			services[key], changed = now, true
		}
		if addrs := s.addrs(); !slices.Equal(addrs, t.addrs[key]) {
			for _, a := range slices.Concat(addrs, t.addrs[key]) {
				moved[a] = true
			}
		}
	}
	if changed {
		t.services = services
	}
	if len(moved) > 0 {
		t.use(a.table, moved)
	}
	clear(t.old)
	return nil
}

// use makes uses those of a table, of addresses that may have others.
func (t *digests) use(now *table, moved map[netip.Addr]bool) {
	gone, come := map[netip.Addr]map[ravel.ServiceKey]bool{}, map[netip.Addr][]ravel.ServiceKey{}
	for key := range t.old {
		addrs := now.ours[key].addrs()
		for _, a := range t.addrs[key] {
			if _, stays := slices.BinarySearchFunc(addrs, a, netip.Addr.Compare); !stays {
				if gone[a] == nil {
					gone[a] = map[ravel.ServiceKey]bool{}
				}
				gone[a][key] = true
			}
		}
		for _, a := range addrs {
			if _, was := slices.BinarySearchFunc(t.addrs[key], a, netip.Addr.Compare); !was {
				come[a] = append(come[a], key)
			}
		}
		if len(addrs) == 0 {
			delete(t.addrs, key)
		} else {
			t.addrs[key] = addrs
		}
	}
	t.uses = maps.Clone(t.uses)
	for a := range moved {
		if gone[a] == nil && come[a] == nil {
			continue
		}
		keys := make([]ravel.ServiceKey, 0, len(t.uses[a])+len(come[a]))
		for _, key := range t.uses[a] {
			if !gone[a][key] {
				keys = append(keys, key)
			}
		}
		keys = append(keys, come[a]...)
		slices.SortFunc(keys, ravel.ServiceKey.Compare)
		if len(keys) == 0 {
			delete(t.uses, a)
		} else {
			t.uses[a] = keys
		}
	}
}

// report is what the kernel's service comes to.
func (t *digests) report(key ravel.ServiceKey, s service) ravel.ServiceReport {
	var r ravel.ServiceReport
	r.Table, r.Available = maglev.Digest(maglev.Size(t.size), s.virtual(key))
	if t.size == 0 || !s.ordered() || slices.ContainsFunc(s.reals, func(r real) bool { return r.last == unknown }) {
		r.Table = 0
	}
	return r
}

// addrs returns the addresses of a service's real servers, sorted.
func (s *service) addrs() []netip.Addr {
	if s == nil {
		return nil
	}
	addrs := make([]netip.Addr, len(s.reals))
	for i, r := range s.reals {
		addrs[i] = r.at.Addr()
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// dump reads a service of ours again.
func (a *applying) dump(key ravel.ServiceKey) error {
	i, have := id{ServiceKey: key}, a.table.ours[key]
	drifted := func() {
		a.metrics.drift.Inc()
		a.log.Warn("IPVS was changed by somebody else", "services", 1)
		delete(a.applied, key)
		a.order = nil
	}
	s, err := a.kernel.GetService(i.request())
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("reading %s: %w", i, err)
	}
	if err != nil || !isOurs(s) {
		drifted()
		a.fresh = false
		delete(a.table.ours, key)
		return nil
	}
	now := serviceOf(s)
	if now.reals, _, err = readReals(a.kernel, i); err != nil {
		return err
	}
	remember(have.reals, now.reals)
	if !now.equal(*have) {
		drifted()
	}
	a.table.ours[key] = now
	return nil
}
