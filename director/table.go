package director

import (
	"net/netip"
	"slices"

	"github.com/moby/ipvs"

	"github.com/ravel-lb/ravel"
)

// Flags of a service besides those of its scheduler (include/uapi/linux/ip_vs.h).
const (
	flagPersistent = 0x1
	flagHashed     = 0x2 // set by the kernel in every service
	flagOnePacket  = 0x4
	flagOurs       = uint32(ravel.Flag3)

	schedulerFlags = ravel.Fallback | ravel.HashPort | ravel.Flag3
)

// none is the name that the kernel gives to no scheduler.
const none = "none"

// unknown is the last weight of a real server that had weight 0 when it was first read: the kernel does not tell it.
// Where it is wanted, any will do.
const unknown = -1

// table is what the kernel holds.
type table struct {
	ours    map[ravel.ServiceKey]*service
	foreign map[ravel.ServiceKey]bool
}

func newTable() *table {
	return &table{ours: map[ravel.ServiceKey]*service{}, foreign: map[ravel.ServiceKey]bool{}}
}

// service is a virtual service as the kernel holds it.
type service struct {
	scheduler string
	flags     uint32 // without flagHashed
	timeout   uint32 // of persistence, in seconds
	netmask   uint32
	reals     []real // newest first
	dumped    bool   // read from the kernel, and not changed since
}

// sameSettings reports whether two services differ at most in their real servers.
func (s service) sameSettings(other service) bool {
	return s.scheduler == other.scheduler && s.flags == other.flags && s.timeout == other.timeout && s.netmask == other.netmask
}

func (s service) equal(other service) bool {
	return s.sameSettings(other) && slices.Equal(s.reals, other.reals)
}

// weighted reports whether any real server other than the one at except has a weight.
func (s service) weighted(except netip.AddrPort) bool {
	return slices.ContainsFunc(s.reals, func(r real) bool { return r.weight > 0 && r.at != except })
}

// count returns how many of the real servers of v are in the service.
func (s service) count(v ravel.VirtualService) int {
	n := 0
	for _, rs := range v.RealServers {
		if s.find(netip.AddrPortFrom(rs.Addr, v.Key.Port)) >= 0 {
			n++
		}
	}
	return n
}

// without returns the service without some real servers.
func (s service) without(some map[netip.AddrPort]bool) service {
	if len(some) > 0 {
		s.reals = slices.DeleteFunc(slices.Clone(s.reals), func(r real) bool { return some[r.at] })
	}
	return s
}

func (s service) find(at netip.AddrPort) int {
	return slices.IndexFunc(s.reals, func(r real) bool { return r.at == at })
}

// real is a real server as the kernel holds it.
type real struct {
	at     netip.AddrPort
	weight int
	last   int    // the last weight that was not 0, or the one it was added with; or unknown
	method uint32 // ipvs.ConnectionFlag…
	upper  uint32 // connection thresholds, 0 is none
	lower  uint32
}

func (r real) destination() *ipvs.Destination {
	return &ipvs.Destination{
		Address: r.at.Addr().AsSlice(), AddressFamily: familyOf(r.at.Addr()), Port: r.at.Port(),
		Weight: r.weight, ConnectionFlags: r.method, UpperThreshold: r.upper, LowerThreshold: r.lower,
	}
}

// serviceOf returns the settings of a service read from the kernel.
func serviceOf(s *ipvs.Service) *service {
	return &service{
		scheduler: s.SchedName, flags: s.Flags &^ flagHashed, timeout: s.Timeout, netmask: s.Netmask, dumped: true,
	}
}

// isOurs reports whether a service read from the kernel is ours.
func isOurs(s *ipvs.Service) bool { return s.FWMark == 0 && s.Flags&flagOurs != 0 }

// targetOf is what the kernel should hold for a service. method says how packets reach a real server.
func targetOf(v ravel.VirtualService, method func(ravel.RealServer) uint32) service {
	s := service{
		scheduler: string(v.Scheduler), flags: uint32(v.Flags) | flagOurs, netmask: netmaskOf(v.Key.VIP),
		reals: make([]real, len(v.RealServers)),
	}
	if v.OnePacket {
		s.flags |= flagOnePacket
	}
	for i, rs := range v.RealServers {
		s.reals[i] = real{
			at: netip.AddrPortFrom(rs.Addr, v.Key.Port), weight: rs.Weight, last: rs.Weight, method: method(rs),
			upper: uint32(v.UpperThreshold), lower: uint32(v.LowerThreshold),
		}
		switch {
		case rs.Weight == 0 && v.Scheduler == ravel.MH:
			s.reals[i].last = rs.LastWeight
		case rs.Weight == 0:
			s.reals[i].last = unknown // no other scheduler reads it
		}
	}
	return s
}

// readTable reads the whole of the kernel's table. Of a real server that has weight 0 now and had in before, the last
// weight is the one known before.
func readTable(k kernel, before *table) (*table, error) {
	services, order, err := readServices(k)
	if err != nil {
		return nil, err
	}
	t := newTable()
	for _, i := range order {
		if !isOurs(services[i]) {
			if i.mark == 0 {
				t.foreign[i.ServiceKey] = true
			}
			continue
		}
		s := serviceOf(services[i])
		if s.reals, _, err = readReals(k, i); err != nil {
			return nil, err
		}
		if was := before.ours[i.ServiceKey]; was != nil {
			remember(was.reals, s.reals)
		}
		t.ours[i.ServiceKey] = s
	}
	return t, nil
}

// remember gives real servers whose last weight the kernel does not tell the one that was known before.
func remember(before, now []real) {
	var last map[netip.AddrPort]int
	for i, r := range now {
		if r.last != unknown {
			continue
		}
		if last == nil {
			last = make(map[netip.AddrPort]int, len(before))
			for _, b := range before {
				last[b.at] = b.last
			}
		}
		if l, known := last[r.at]; known {
			now[i].last = l
		}
	}
}

// drift counts the services that two tables have not alike.
func drift(a, b *table) int {
	n := 0
	for k, s := range a.ours {
		if other := b.ours[k]; other == nil || !s.equal(*other) {
			n++
		}
	}
	for k := range b.ours {
		if a.ours[k] == nil {
			n++
		}
	}
	return n
}
