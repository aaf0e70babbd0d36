package gossip

import (
	"maps"
	"math"
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
)

// A service in a name is its protocol, its port (big endian), the length of its VIP (4 or 16), and the VIP.

func appendService(b []byte, k ravel.ServiceKey) []byte {
	vip := k.VIP.AsSlice()
	b = append(b, byte(k.Proto), byte(k.Port>>8), byte(k.Port), byte(len(vip)))
	return append(b, vip...)
}

func serviceName(k ravel.ServiceKey) string { return string(appendService(nil, k)) }

// serviceLen is the length of the service that s begins with; it is beyond the end of s if there is none.
func serviceLen(s string) int {
	if len(s) < 4 {
		return len(s) + 1
	}
	return 4 + int(s[3])
}

func parseService(s string) (ravel.ServiceKey, bool) {
	if len(s) < 4 || serviceLen(s) != len(s) {
		return ravel.ServiceKey{}, false
	}
	vip, ok := parseAddr(s[4:])
	return ravel.ServiceKey{VIP: vip, Proto: ravel.Proto(s[0]), Port: uint16(s[1])<<8 | uint16(s[2])}, ok
}

// plain reports whether an address is one that travels: IPv4 or IPv6, without a zone, not IPv4 in IPv6.
func plain(a netip.Addr) bool { return a.IsValid() && !a.Is4In6() && a.Zone() == "" }

func addrName(a netip.Addr) string { return string(a.AsSlice()) }

func parseAddr(s string) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice([]byte(s))
	return a, ok && !a.Is4In6()
}

func addrPortName(a netip.AddrPort) string {
	return addrName(a.Addr()) + string([]byte{byte(a.Port() >> 8), byte(a.Port())})
}

func parseAddrPort(b []byte) (netip.AddrPort, bool) {
	n := len(b) - 2
	if n < 0 {
		return netip.AddrPort{}, false
	}
	a, ok := parseAddr(string(b[:n]))
	return netip.AddrPortFrom(a, uint16(b[n])<<8|uint16(b[n+1])), ok
}

// The roster's entries. The state comes first and is always there, so that of equal ranks the higher state counts.

func entryCell(service string, e ravel.RosterEntry) *cell {
	b := appendVarint(nil, 1, uint64(e.State))
	b = appendVarint(b, 2, uint64(max(0, e.Weight)))
	if e.By != "" {
		b = appendText(b, 3, e.By)
	}
	return newCell(key{topicRoster, "", service + addrName(e.Addr)}, rank{e.Birth, e.Rev}, string(b)+e.Unknown, "")
}

// parseEntry reads a roster's cell.
func parseEntry(c *cell) (k ravel.ServiceKey, e ravel.RosterEntry, ok bool) {
	n := serviceLen(c.name)
	if n > len(c.name) {
		return k, e, false
	}
	if k, ok = parseService(c.name[:n]); !ok {
		return k, e, false
	}
	if e.Addr, ok = parseAddr(c.name[n:]); !ok {
		return k, e, false
	}
	e.Birth, e.Rev = c.hi, c.lo
	var unknown []byte
	ok = eachField([]byte(c.value), func(x field) bool {
		var n uint64
		switch x.number {
		case 1:
			ok := x.varint(&n) && n <= math.MaxUint8
			e.State = ravel.RosterState(n)
			return ok
		case 2:
			ok := x.varint(&n) && n <= math.MaxUint16
			e.Weight = int(n)
			return ok
		case 3:
			return x.text(&e.By)
		}
		unknown = append(unknown, x.raw...)
		return true
	})
	e.Unknown = string(unknown)
	return k, e, ok
}

// Registers.

func registerCell(name string, r ravel.Register) *cell {
	b := appendText(nil, 1, r.Value)
	b = appendText(b, 2, r.By)
	return newCell(key{topicRegister, "", name}, rank{r.Stamp, 0}, string(b), "")
}

func parseRegister(c *cell) (r ravel.Register, ok bool) {
	r.Stamp = c.hi
	ok = eachField([]byte(c.value), func(x field) bool {
		switch x.number {
		case 1:
			return x.text(&r.Value)
		case 2:
			return x.text(&r.By)
		}
		return true
	})
	return r, ok
}

// cellName is the part of a key that an author chooses.
type cellName struct {
	topic uint32
	name  string
}

// reportValues is a report as the values of an author's cells, without its life; none is empty.
func reportValues(r ravel.Report) map[cellName]string {
	values := map[cellName]string{}
	for k, v := range r.Services {
		b := appendFixed(nil, 1, v.Wish)
		b = appendFixed(b, 2, v.Table)
		values[cellName{topicService, serviceName(k)}] = string(appendFixed(b, 3, v.Available))
	}
	for a, services := range r.Uses {
		for part, some := range divideUses(services) {
			values[cellName{topicUses, usesName(a, part)}] = usesValue(some)
		}
	}
	for a, h := range r.Health {
		values[cellName{topicHealth, addrName(a)}] = string(appendVarint(nil, 1, uint64(h)))
	}
	for k, ready := range r.Redirects {
		values[cellName{topicRedirect, serviceName(k)}] = string(appendVarint(nil, 1, flag(ready)))
	}
	b := appendVarint(nil, 1, uint64(max(0, r.TableSize)))
	b = appendVarint(b, 2, flag(r.Redirects != nil))
	for _, a := range slices.SortedFunc(maps.Keys(r.Sessions), netip.Addr.Compare) {
		s := appendText(nil, 1, a.String())
		b = appendText(b, 3, appendVarint(s, 2, flag(r.Sessions[a])))
	}
	if n := withdrawnNumber(r); n > 0 {
		b = appendVarint(b, 4, n)
	}
	if r.Unheard > 0 {
		b = appendVarint(b, 5, r.Unheard)
	}
	values[cellName{topicSelf, ""}] = string(b)
	return values
}

// The services of one real server may be more than a cell holds: they are divided into a power of two of parts by a
// hash, so that one more or less is a change of one part.
const (
	usesInPart = 1000 // on average, at most
	usesParts  = 256  // then a part is too big for a cell by and by
)

func divideUses(services []ravel.ServiceKey) [][]ravel.ServiceKey {
	if len(services) == 0 {
		return nil
	}
	n := 1
	for n*usesInPart < len(services) && n < usesParts {
		n *= 2
	}
	parts := make([][]ravel.ServiceKey, n)
	for _, k := range services {
		part := newHash().text(serviceName(k)).sum() % uint64(n)
		parts[part] = append(parts[part], k)
	}
	return parts
}

// usesName is an address and, from the second part on, the number of the part.
func usesName(a netip.Addr, part int) string {
	if part == 0 {
		return addrName(a)
	}
	return addrName(a) + string([]byte{byte(part)})
}

func parseUsesName(s string) (a netip.Addr, part int, ok bool) {
	if n := len(s) - 1; n == 4 || n == 16 {
		s, part = s[:n], int(s[n])
		if part == 0 {
			return a, 0, false
		}
	}
	a, ok = parseAddr(s)
	return a, part, ok
}

func usesValue(services []ravel.ServiceKey) string {
	sorted := slices.SortedFunc(slices.Values(services), ravel.ServiceKey.Compare)
	var b []byte
	for _, k := range slices.Compact(sorted) {
		b = appendText(b, 1, appendService(nil, k))
	}
	return string(b)
}

func flag(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

// phase is where a process is in its life, as it says itself.
type phase uint8

const (
	up         phase = 1
	restarting phase = 2
	leaving    phase = 3
)

func lifeValue(p phase) string { return string(appendVarint(nil, 1, uint64(p))) }

func parseLife(value string) (p phase) {
	eachField([]byte(value), func(x field) bool {
		if x.number == 1 && x.n <= math.MaxUint8 {
			p = phase(x.n)
		}
		return true
	})
	return p
}

func parseServiceReport(value string) (r ravel.ServiceReport, ok bool) {
	ok = eachField([]byte(value), func(x field) bool {
		switch x.number {
		case 1:
			return x.fixed(&r.Wish)
		case 2:
			return x.fixed(&r.Table)
		case 3:
			return x.fixed(&r.Available)
		}
		return true
	})
	return r, ok
}

func parseUses(value string) (services []ravel.ServiceKey, ok bool) {
	ok = eachField([]byte(value), func(x field) bool {
		var s string
		if x.number != 1 {
			return true
		}
		if !x.text(&s) {
			return false
		}
		k, ok := parseService(s)
		services = append(services, k)
		return ok
	})
	return services, ok
}

// parseNumber reads a value whose first field is a small number: health, a redirect.
func parseNumber(value string) (n uint64, ok bool) {
	ok = eachField([]byte(value), func(x field) bool {
		return x.number != 1 || x.varint(&n) && n <= math.MaxUint8
	})
	return n, ok
}

// withdrawnNumber says of which families a director announces nothing: 1 both, 2 IPv4, 3 IPv6, 4 both by its settings.
func withdrawnNumber(r ravel.Report) uint64 {
	switch {
	case r.Dark:
		return 4
	case r.Withdrawn4 && r.Withdrawn6:
		return 1
	case r.Withdrawn4:
		return 2
	case r.Withdrawn6:
		return 3
	}
	return 0
}

// self is what an author says once of itself.
type self struct {
	tableSize int
	redirects bool   // it speaks of redirects
	withdrawn uint64 // as withdrawnNumber has it; what else it may be in a later release is both
	unheard   uint64
	sessions  map[netip.Addr]bool
}

func parseSelf(value string) (s self, ok bool) {
	ok = eachField([]byte(value), func(x field) bool {
		var n uint64
		switch x.number {
		case 1:
			ok := x.varint(&n) && n <= math.MaxInt32
			s.tableSize = int(n)
			return ok
		case 2:
			ok := x.varint(&n)
			s.redirects = n != 0
			return ok
		case 3:
			addr, up, ok := parseSession(x)
			if ok {
				if s.sessions == nil {
					s.sessions = map[netip.Addr]bool{}
				}
				s.sessions[addr] = up
			}
			return ok
		case 4:
			return x.varint(&s.withdrawn)
		case 5:
			return x.varint(&s.unheard)
		}
		return true
	})
	return s, ok
}

func parseSession(x field) (addr netip.Addr, up, ok bool) {
	var b string
	if !x.text(&b) {
		return addr, false, false
	}
	ok = eachField([]byte(b), func(x field) bool {
		var s string
		var n uint64
		switch x.number {
		case 1:
			if !x.text(&s) {
				return false
			}
			var err error
			addr, err = netip.ParseAddr(s)
			return err == nil
		case 2:
			ok := x.varint(&n)
			up = n != 0
			return ok
		}
		return true
	})
	return addr, up, ok && addr.IsValid()
}
