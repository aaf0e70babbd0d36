package director

import (
	"fmt"
	"time"

	"github.com/ravel-lb/ravel"
)

// nodest is the setting by which the kernel expires, instead of keeping, the flows of a real server that is removed.
const nodest = "net/ipv4/vs/expire_nodest_conn"

// leaving is the removal of a real server from a UDP service, whose flows go with it.
type leaving struct {
	id   id
	have *service
	want service
	step step
}

// expire removes the real servers that leave UDP services, and their flows. Else the kernel would drop the packets of
// these silently, for as long as a client sends and 300 s more (ip_vs_in in ip_vs_core.c), where other UDP flows go on
// elsewhere.
//
// A removal while the setting is 1 has the kernel go through all flows once, a tick later, whatever the setting is then
// (ip_vs_expire_nodest_conn_flush in ip_vs_conn.c, Linux 5.9 and later), and expire those whose real server is in no
// list; those of TCP whose real server left for good are among them. A real server that is taken out to be added again
// must not meet that: mustWait. Services of which a removal fails are added to refused.
func (a *applying) expire(refused map[ravel.ServiceKey]bool) []error {
	if len(a.leaving) == 0 {
		return nil
	}
	if a.Director.sysctl != nil {
		if err := a.Director.sysctl.Set(nodest, "1"); err != nil {
			a.host = append(a.host, unexpired(err))
		} else {
			defer func() {
				if err := a.Director.sysctl.Set(nodest, "0"); err != nil {
					a.host = append(a.host, unexpired(err))
					a.tuned = false
				}
				a.expired = time.Now()
			}()
		}
	}
	var errs []error
	for _, l := range a.leaving {
		if err := a.step(l.id, l.have, l.want, l.step); err != nil {
			errs = append(errs, err)
			delete(a.applied, l.id.ServiceKey)
			refused[l.id.ServiceKey], a.order = true, nil
			if a.stale || a.ctx.Err() != nil {
				break
			}
		}
	}
	return errs
}

func unexpired(err error) ravel.Problem {
	return ravel.Problem{
		Where: "sysctl " + nodest,
		What:  fmt.Sprintf("clients of UDP may go on sending to a real server that is gone: %v", err),
	}
}

// expiring is how long the kernel may be at expiring flows: some 100 ns for each that there is.
const expiring = time.Second

// mustWait reports whether the kernel may be expiring flows still, so that nothing may be added again.
func (a *applying) mustWait() bool {
	return !a.expired.IsZero() && time.Since(a.expired) < a.expiring
}

// wait waits until it must not.
func (a *applying) wait() error {
	select {
	case <-a.ctx.Done():
		return a.ctx.Err()
	case <-time.After(time.Until(a.expired.Add(a.expiring))):
		return nil
	}
}
