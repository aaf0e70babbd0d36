package director

import (
	"errors"
	"fmt"
	"slices"

	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

// adoptable reports whether a service that is not ours may be taken over: one of a load balancer by direct routing or
// tunnels, as the original Ravel's is. kube-proxy's are not: it rewrites addresses.
func adoptable(key ravel.ServiceKey, s service) bool {
	return s.flags&flagPersistent == 0 && !slices.ContainsFunc(s.reals, func(r real) bool {
		return r.at.Port() != key.Port || r.method != ipvs.ConnectionFlagDirectRoute && r.method != ipvs.ConnectionFlagTunnel
	})
}

// adopt makes a foreign service ours where it stands, with its real servers and open flows: it gets our flag and is then
// edited like any other. It is left as it is while the wanted one would take no new flows, because that is not known
// better than what somebody decided before. What is in the way is returned as a Problem.
func (a *applying) adopt(v ravel.VirtualService) (adopted bool, problems []ravel.Problem, err error) {
	i := id{ServiceKey: v.Key}
	s, err := a.kernel.GetService(i.request())
	if errors.Is(err, unix.ESRCH) {
		a.stale = true
		return false, nil, fmt.Errorf("reading %s: %w", i, errStale)
	}
	if err != nil {
		return false, nil, fmt.Errorf("reading %s: %w", i, err)
	}
	have := serviceOf(s)
	if have.reals, _, err = readReals(a.kernel, i); err != nil {
		return false, nil, err
	}
	switch {
	case !adoptable(v.Key, *have):
		return false, []ravel.Problem{foreign(v.Key)}, nil
	case !v.TakesNewFlows():
		return false, nil, nil
	}
	marked := *have
	marked.flags |= flagOurs
	a.told.touch(v.Key, nil)
	if err := a.do(editService, i.String(), func() error { return a.kernel.UpdateService(i.full(marked)) }); err != nil {
		return false, nil, err
	}
	marked.dumped = false
	a.table.ours[v.Key] = &marked
	delete(a.table.foreign, v.Key)
	a.mu.Lock()
	a.foreign = slices.DeleteFunc(slices.Clone(a.foreign), func(key ravel.ServiceKey) bool { return key == v.Key })
	a.mu.Unlock()
	a.log.Info("virtual service of another program taken over", "service", v.Key.String(), "scheduler", marked.scheduler, "realServers", len(marked.reals))
	return true, nil, nil
}
