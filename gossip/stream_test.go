package gossip

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/gossip/gossiptest"
)

// noTCP opens no streams to some.
type noTCP struct {
	*gossiptest.Transport
	deaf func(netip.AddrPort) bool
}

func (n noTCP) DialTimeout(addr string, d time.Duration) (net.Conn, error) {
	if n.deaf(netip.MustParseAddrPort(addr)) {
		time.Sleep(d)
		return nil, errors.New("no answer")
	}
	return n.Transport.DialTimeout(addr, d)
}

// Members that take no TCP hold up nobody else, and are told of.
func TestMembersWithoutTCP(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		const many = 20
		var deafness atomic.Bool
		deafness.Store(true)
		deaf := func(to netip.AddrPort) bool { // hosts from 256 on, and a director
			return deafness.Load() && (to.Addr().As4()[2] == 1 || to == at(3))
		}
		start := func(n int, role ravel.Role) *process {
			c := w.config(n, role)
			c.Preset, c.Transport = LAN, noTCP{w.net.Transport(c.Bind), deaf}
			defer func() { w.seeds = []string{at(1).String()} }()
			return w.start(c)
		}
		var all []*process
		for n := range 3 {
			all = append(all, start(n+1, ravel.Director))
		}
		var services []ravel.ServiceKey
		for n := range 100 {
			services = append(services, service(2*n+1))
		}
		uses := map[netip.Addr][]ravel.ServiceKey{}
		for n := range many {
			start(256+n, ravel.Realserver)
			uses[at(256+n).Addr()] = services
		}
		until(t, "all know each other", 30*time.Second, func() bool {
			return !slices.ContainsFunc(all, func(p *process) bool { return !p.fleet().Settled || len(p.fleet().Members) != many+3 })
		})
		var entries []ravel.RosterEntry
		for n := range 100 {
			entries = append(entries, entry(n, 1, ravel.Active))
		}
		worst := time.Duration(0)
		for k := range 6 {
			services[0].Port = uint16(k)
			for _, p := range all {
				p.Report(ravel.Report{Uses: uses})
			}
			time.Sleep(time.Second)
			for i := range entries {
				entries[i].Rev++
			}
			all[k%2].Write(service(2), entries)
			worst = max(worst, until(t, "a roster travels", time.Minute, func() bool {
				return !slices.ContainsFunc(all[:2], func(p *process) bool {
					r := p.fleet().Rosters[service(2)]
					return len(r) == 0 || r[0].Rev != entries[0].Rev
				})
			}))
		}
		if worst > 200*time.Millisecond {
			t.Errorf("a roster took %s to another director", worst)
		}
		until(t, "the director without TCP has it too", 10*time.Second, func() bool {
			r := all[2].fleet().Rosters[service(2)]
			return len(r) == len(entries) && r[0].Rev == entries[0].Rev
		})
		time.Sleep(time.Minute)
		if text := fmt.Sprint(all[0].Problems()); !strings.Contains(text, "TCP to d3, r256, r257, r258, r259 and 16 others") {
			t.Errorf("problems %s", text)
		}
		deafness.Store(false)
		until(t, "nobody is deaf any more", 3*time.Minute, func() bool { return len(all[0].Problems()) == 0 })
	})
}
