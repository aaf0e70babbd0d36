package main

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/internal/roster"
)

// prediction is what becomes of the services of a director by a change of its inputs when nothing else changes: first
// the drains begin and newcomers rise, then the drains are over. It is made by the code that does it, and it is pure.
type prediction struct {
	services []*predicted // those for which the change makes a difference, by key
	by       map[ravel.ServiceKey]*predicted
	problems []ravel.Problem // that the change brings
	bereft   []ravel.ServiceKey
}

// predicted is one service: what the kernel holds today, and then.
type predicted struct {
	key               ravel.ServiceKey
	name              string
	today, begin, end *layout // nil where there is no such service
	leaving           map[netip.Addr]bool
	live, on          int
	exposed           [3]int // live connections that another director would send elsewhere: today, begin, end
	moved             [2]int // live connections whose pick changes: at the begin, at the end
}

// layout is a service with its table; the table is nil where its scheduler has none.
type layout struct {
	v     ravel.VirtualService
	table *maglev.Table
}

func layoutOf(size maglev.Size, services []ravel.VirtualService, key ravel.ServiceKey) *layout {
	v, there := serviceOf(services, key)
	if !there {
		return nil
	}
	l := &layout{v: v}
	if v.Scheduler == ravel.MH {
		l.table = maglev.Build(size, v)
	}
	return l
}

// pick is who gets a client's new flow; invalid is nobody.
func (l *layout) pick(client netip.AddrPort) netip.Addr {
	if l == nil || l.table == nil {
		return netip.Addr{}
	}
	i, ok := l.table.Pick(client)
	if !ok {
		return netip.Addr{}
	}
	return l.v.RealServers[i].Addr
}

func (l *layout) has(addr netip.Addr) bool {
	return l != nil && slices.ContainsFunc(l.v.RealServers, func(rs ravel.RealServer) bool { return rs.Addr == addr })
}

// predict says what a director's kernel holds after its inputs became others. in and changed have their Agreed, with the
// rosters of the fleet.
func predict(self string, size maglev.Size, kernel []ravel.VirtualService, in, changed desired.Inputs) *prediction {
	begin, end, brings := advance(self, changed)
	else1, else2, had := advance(self, in) // what comes anyhow
	p := &prediction{by: map[ravel.ServiceKey]*predicted{}}
	for _, problem := range brings {
		if !slices.Contains(had, problem) {
			p.problems = append(p.problems, problem)
		}
	}
	keys := map[ravel.ServiceKey]bool{}
	for _, list := range [][]ravel.VirtualService{kernel, begin, end} {
		for _, v := range list {
			keys[v.Key] = true
		}
	}
	for _, key := range slices.SortedFunc(maps.Keys(keys), ravel.ServiceKey.Compare) {
		if alike(size, key, begin, else1) && alike(size, key, end, else2) {
			continue
		}
		p.add(key, layoutOf(size, kernel, key), layoutOf(size, begin, key), layoutOf(size, end, key))
	}
	p.bereft = bereft(in, changed)
	return p
}

// alike reports whether a service is the same in two lists.
func alike(size maglev.Size, key ravel.ServiceKey, a, b []ravel.VirtualService) bool {
	v, inA := serviceOf(a, key)
	w, inB := serviceOf(b, key)
	if !inA || !inB {
		return inA == inB
	}
	t1, a1 := maglev.Digest(size, v)
	t2, a2 := maglev.Digest(size, w)
	return t1 == t2 && a1 == a2 && v.OnePacket == w.OnePacket
}

// advance returns the services once the drains have begun and newcomers have risen, and once the drains are over.
func advance(self string, in desired.Inputs) (begin, end []ravel.VirtualService, problems []ravel.Problem) {
	wishes := desired.Wishes(in)
	agreed := *in.Agreed
	in.Agreed = &agreed
	step := func(over bool) (ravel.State, []ravel.Problem) {
		rosters := maps.Clone(agreed.Rosters)
		if rosters == nil {
			rosters = map[ravel.ServiceKey]ravel.Roster{}
		}
		for key, wished := range wishes {
			rosters[key] = roster.Predict(self, rosters[key], wished, over)
		}
		agreed.Rosters = rosters
		return desired.Compute(in)
	}
	first, problems := step(false)
	second, _ := step(true)
	return first.Services, second.Services, problems
}

func (p *prediction) add(key ravel.ServiceKey, today, begin, end *layout) {
	s := &predicted{key: key, today: today, begin: begin, end: end, leaving: map[netip.Addr]bool{}}
	for _, l := range []*layout{today, begin, end} {
		if l != nil {
			s.name = cmp.Or(s.name, l.v.Name)
		}
	}
	if today != nil {
		for _, rs := range today.v.RealServers {
			if rs.Weight > 0 && !begin.takes(rs.Addr) {
				s.leaving[rs.Addr] = true
			}
		}
	}
	p.services = append(p.services, s)
	p.by[key] = s
}

// takes reports whether a real server takes new flows.
func (l *layout) takes(addr netip.Addr) bool {
	return l != nil && slices.ContainsFunc(l.v.RealServers, func(rs ravel.RealServer) bool { return rs.Addr == addr && rs.Weight > 0 })
}

// count takes one connection of the director into account.
func (p *prediction) count(c connection) {
	s := p.by[c.service]
	if s == nil || !c.live {
		return
	}
	s.live++
	if s.leaving[c.real] {
		s.on++
	}
	if s.today == nil || s.today.table == nil {
		return
	}
	picks := [3]netip.Addr{s.today.pick(c.client), s.begin.pick(c.client), s.end.pick(c.client)}
	for i, pick := range picks {
		// Who is out of the list at the end took its connections along: no director's loss is needed for that.
		if pick != c.real && (i < 2 || s.end.has(c.real)) {
			s.exposed[i]++
		}
	}
	for i := range s.moved {
		if picks[i] != picks[i+1] {
			s.moved[i]++
		}
	}
}

// moved are the slots and the share of new flows that go elsewhere between two layouts of a service.
func moved(a, b *layout) (slots int, share float64) {
	switch {
	case a == nil || a.table == nil || len(a.v.RealServers) == 0:
		return 0, 0 // nobody had a flow
	case b == nil || b.table == nil:
		return int(a.table.Size()), 1
	}
	return maglev.Moved(a.table, b.table)
}

// remark says of a service what its numbers do not.
func (s *predicted) remark() string {
	switch {
	case s.today == nil:
		return "a new service"
	case s.begin == nil:
		return "the service goes"
	case s.today.table == nil || s.begin.table == nil:
		return fmt.Sprintf("the scheduler %s has no table to tell by", s.begin.v.Scheduler)
	}
	return ""
}
