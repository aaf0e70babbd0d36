package director

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/ravel-lb/ravel"
)

// making is one service under way to what is wanted.
type making struct {
	*applying
	id   id
	have *service // as the kernel holds it; edited with it
	want service
	made bool // by this Apply, so that it is ours for certain
	errs []error

	letGo func() // ends the hold on new flows; nil while nothing is held back
	tried bool   // to hold them back
}

// errLater says that a service must wait for the kernel to have expired the flows of others: see expire.go.
var errLater = errors.New("to be added again in a moment")

// servers does what the real servers lack. Where one cannot be done the others are planned anew without it, so that it is
// no reason to add them again. An error means that nothing more of the service can be done now.
func (m *making) servers() error {
	broken := map[netip.AddrPort]bool{}
	for {
		steps := plan(m.have.without(broken), m.want.without(broken))
		if slices.ContainsFunc(steps, func(s step) bool { return s.again }) && m.mustWait() {
			return errLater
		}
		m.tell(steps)
		failed, err := m.walk(steps)
		if err != nil {
			return join(append(m.errs, err))
		}
		if !failed.IsValid() {
			return nil
		}
		broken[failed] = true
	}
}

// tell logs what may cost open flows a packet.
func (m *making) tell(steps []step) {
	n := 0
	for _, s := range steps {
		if s.again {
			n++
		}
	}
	if n > 0 {
		m.log.Info("real servers are added again, to be where they belong", "service", m.id.String(), "realServers", n)
	}
}

// walk does steps until one fails, and returns whose that was.
func (m *making) walk(steps []step) (failed netip.AddrPort, err error) {
	var left []leaving
	last := -1
	for n, s := range steps {
		if s.held {
			last = n
		}
	}
	for n, s := range steps {
		if s.op == delReal && m.sticky() {
			left = append(left, leaving{m.id, m.have, m.want, s})
			continue
		}
		if s.held {
			m.hold("the slots of its real servers")
		}
		err := m.step(m.id, m.have, m.want, s)
		if n >= last && m.have.scheduler == m.want.scheduler {
			m.release()
		}
		switch {
		case err == nil:
		case m.stale || m.ctx.Err() != nil:
			return s.real.at, err
		default:
			m.errs = append(m.errs, err)
			return s.real.at, nil
		}
	}
	m.leaving = append(m.leaving, left...)
	return netip.AddrPort{}, nil
}

// hold has new flows wait until release, if the service takes any.
func (m *making) hold(changes string) {
	if m.tried || m.holdBack == nil || m.have.scheduler == none {
		return
	}
	m.tried = true
	release, err := m.holdBack(m.id.ServiceKey)
	m.letGo = release
	if err != nil {
		m.faults = append(m.faults, ravel.Problem{
			Where: m.id.String(), What: fmt.Sprintf("new flows could not be held back while %s changed: %v", changes, err),
		})
	}
}

// release ends what hold began.
func (m *making) release() {
	if m.letGo != nil {
		m.letGo()
	}
	m.letGo, m.tried = nil, false
}

// sticky reports whether the service has flows of UDP.
func (m *making) sticky() bool { return m.id.Proto == ravel.UDP && m.have.flags&flagOnePacket == 0 }

// step does one step and remembers it as the kernel does.
func (a *applying) step(i id, have *service, want service, s step) error {
	what := fmt.Sprintf("real server %s of %s", s.real.at, i)
	if s.takes && want.weighted(netip.AddrPort{}) && !have.weighted(s.real.at) {
		return fmt.Errorf("%s is the last one with a weight: kept", what)
	}
	a.told.touch(i.ServiceKey, have)
	request, destination := i.request(), s.real.destination()
	// What may not stay half done is asked for once more.
	do := func(request func() error) error {
		err := a.do(s.op, what, request)
		if err != nil && (s.again || s.held) && !a.stale && a.ctx.Err() == nil {
			err = a.do(s.op, what, request)
		}
		return err
	}
	remove := func() error {
		err := a.do(delReal, what, func() error { return a.kernel.DelDestination(request, destination) })
		if err == nil {
			at := have.find(s.real.at)
			have.reals = slices.Delete(have.reals, at, at+1)
		}
		return err
	}
	switch s.op {
	case addReal:
		if s.again {
			if err := remove(); err != nil {
				return err
			}
		}
		if err := do(func() error { return a.kernel.NewDestination(request, destination) }); err != nil {
			return err
		}
		added := s.real
		added.last = added.weight
		have.reals = slices.Insert(have.reals, 0, added)
	case editReal:
		if err := do(func() error { return a.kernel.UpdateDestination(request, destination) }); err != nil {
			return err
		}
		r := &have.reals[have.find(s.real.at)]
		last := r.last
		*r = s.real
		if r.last = last; r.weight > 0 {
			r.last = r.weight
		}
	case delReal:
		return remove()
	}
	return nil
}

// settings edits a service in place.
func (m *making) settings() error {
	if !m.made {
		if err := m.confirm(m.id); err != nil {
			return err
		}
	}
	edit := func(scheduler string) error {
		m.told.touch(m.id.ServiceKey, m.have)
		s := m.want
		s.scheduler = scheduler
		what := m.id.String()
		if m.have.scheduler != scheduler {
			what = fmt.Sprintf("scheduler %s of %s", scheduler, m.id)
		}
		if err := m.do(editService, what, func() error { return m.kernel.UpdateService(m.id.full(s)) }); err != nil {
			return err
		}
		m.have.scheduler, m.have.flags, m.have.timeout, m.have.netmask = s.scheduler, s.flags, s.timeout, s.netmask
		return nil
	}
	was := m.have.scheduler
	if was == m.want.scheduler || was == none {
		return edit(m.want.scheduler)
	}
	m.hold("its scheduler")
	if m.unbound > 0 {
		if err := edit(none); err != nil {
			return err
		}
		select {
		case <-m.ctx.Done():
		case <-time.After(m.unbound):
		}
	}
	err := edit(m.want.scheduler)
	if err != nil && !m.stale && (m.have.scheduler == none || !errors.Is(err, errModule)) {
		// The kernel may have taken the old one away before it failed.
		err = errors.Join(err, edit(was))
	}
	if err == nil {
		m.log.Info("scheduler changed", "service", m.id.String(), "from", was, "to", m.want.scheduler)
	}
	return err
}
