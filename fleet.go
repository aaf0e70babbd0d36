package ravel

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Role is what a process of the fleet does.
type Role uint8

const (
	// Director attracts packets for the VIPs and spreads them over real servers.
	Director Role = iota
	// Realserver hands packets for the VIPs to the pods of its node.
	Realserver
)

// String returns "director" or "realserver".
func (r Role) String() string {
	if r == Realserver {
		return "realserver"
	}
	return "director"
}

// MarshalText writes String.
func (r Role) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads "director" or "realserver" and refuses all else.
func (r *Role) UnmarshalText(b []byte) error {
	switch string(b) {
	case "director":
		*r = Director
	case "realserver":
		*r = Realserver
	default:
		return fmt.Errorf("role %q: want director or realserver", b)
	}
	return nil
}

// Fleet is what one process knows of the fleet: who is in it, what its members say of themselves, and what they agreed
// on. It is never changed after it is made. The zero value knows nobody.
type Fleet struct {
	// Settled says that this process has heard from every member it can reach, or has waited long enough: what it knows
	// is as good as it gets, and it may decide.
	Settled bool
	// Members are those that are there or lately were, this process included, by name.
	Members []Member
	// Rosters are the fleet's, by service; a service that no roster was ever written for has none.
	Rosters map[ServiceKey]Roster
	// Reports are what members say, by the member's name; this process' own is among them.
	Reports map[string]Report
	// Registers are the fleet's own settings, by name.
	Registers map[string]Register
}

// Live yields the members of a role that are there: alive or suspected, and not leaving.
func (f Fleet) Live(role Role) []Member {
	var live []Member
	for _, m := range f.Members {
		if m.Role == role && m.State.Live() {
			live = append(live, m)
		}
	}
	return live
}

// Member returns the member of a name.
func (f Fleet) Member(name string) (Member, bool) {
	i, found := slices.BinarySearchFunc(f.Members, name, func(m Member, name string) int { return cmp.Compare(m.Name, name) })
	if !found {
		return Member{}, false
	}
	return f.Members[i], true
}

// Member is a process of the fleet as gossip knows it.
type Member struct {
	Name    string         `json:"name"` // of the director or node
	Role    Role           `json:"role"`
	Gossip  netip.AddrPort `json:"gossip"` // where it gossips
	Addrs   []netip.Addr   `json:"addresses"`
	Version string         `json:"version"` // of the program
	Wire    uint32         `json:"wire"`    // the newest version of the wire format that it speaks
	State   MemberState    `json:"state"`
	// Keys name the gossip keys that it can read, in the order of its file, without giving them away; none is in the clear.
	Keys []string `json:"keys,omitempty"`
}

// MemberState is how gossip sees a member (the SWIM protocol's words).
type MemberState uint8

const (
	// Alive answers.
	Alive MemberState = iota
	// Suspect does not answer, and may still refute that it is dead.
	Suspect
	// Dead did not refute in time.
	Dead
	// Restarting said goodbye and comes back: its host is there.
	Restarting
	// Left said goodbye for good.
	Left
)

var memberStates = []string{"alive", "suspect", "dead", "restarting", "left"}

// Live reports whether the member counts as being there.
func (s MemberState) Live() bool { return s == Alive || s == Suspect }

// String returns "alive", "suspect", "dead", "restarting" or "left".
func (s MemberState) String() string { return memberStates[min(int(s), len(memberStates)-1)] }

// MarshalText writes String.
func (s MemberState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what String writes.
func (s *MemberState) UnmarshalText(b []byte) error {
	i := slices.Index(memberStates, string(b))
	if i < 0 {
		return fmt.Errorf("state of a member %q: want one of %v", b, memberStates)
	}
	*s = MemberState(i)
	return nil
}

// Roster is the order and the last weights of a service's real servers, which the fleet agrees on so that every
// director builds the same Maglev table (ip_vs_mh.c fills it by walking the list). Entries are sorted newest first, as
// the kernel's list holds them, by Compare; no address is in it twice. Entries that are Gone stay for a while, so that
// nobody who missed it brings them back.
type Roster []RosterEntry

// Find returns the entry of a real server.
func (r Roster) Find(addr netip.Addr) (RosterEntry, bool) {
	for _, e := range r {
		if e.Addr == addr {
			return e, true
		}
	}
	return RosterEntry{}, false
}

// RosterEntry is one real server in a roster. Of two that say different things about one, that with the higher Birth,
// then Rev, counts; which of two with equal stamps does is arbitrary and the same everywhere.
type RosterEntry struct {
	Addr netip.Addr `json:"address"`
	// Birth is the stamp of its place in the list: one above all that its author knew in this roster. Those that joined
	// together share one; the higher address is then the newer.
	Birth uint64 `json:"birth"`
	// Rev counts what was written about it since its birth.
	Rev   uint64      `json:"revision"`
	State RosterState `json:"state"`
	// Weight is what its slots in the Maglev table come from (last_weight): 0 to 65535, and 0 while it is Joining.
	Weight int `json:"weight"`
	// By is the director that began its drain, and ends it. Empty unless it is Draining.
	By string `json:"by,omitempty"`
	// Unknown is what a newer version of the wire format says of it; it is carried on.
	Unknown string `json:"-"`
}

// Compare orders entries as the kernel's list: newest first.
func (e RosterEntry) Compare(other RosterEntry) int {
	return cmp.Or(cmp.Compare(other.Birth, e.Birth), other.Addr.Compare(e.Addr))
}

// RosterState is where a real server is in its life.
type RosterState uint8

const (
	// Joining has its place and no slots: its node may lack the redirect still.
	Joining RosterState = iota
	// Active has slots, and takes new flows unless a director knows a reason against it.
	Active
	// Draining keeps its slots, and takes no new flows.
	Draining
	// Gone is not in the kernel's list any more.
	Gone
)

var rosterStates = []string{"joining", "active", "draining", "gone"}

// String returns "joining", "active", "draining" or "gone".
func (s RosterState) String() string { return rosterStates[min(int(s), len(rosterStates)-1)] }

// MarshalText writes String.
func (s RosterState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what String writes.
func (s *RosterState) UnmarshalText(b []byte) error {
	i := slices.Index(rosterStates, string(b))
	if i < 0 {
		return fmt.Errorf("state of a roster's entry %q: want one of %v", b, rosterStates)
	}
	*s = RosterState(i)
	return nil
}

// Report is what a member says of itself. Only its author changes it; it is never changed after it is made.
type Report struct {
	// Services are, of a director, what it wants and holds of each service.
	Services map[ServiceKey]ServiceReport
	// Uses are, of a director, the services for which its kernel's list has a real server, by that address; the
	// realserver of the address keeps its redirects of them. Directors do not hear each other's.
	Uses map[netip.Addr][]ServiceKey
	// Health is, of a director, what its probes of a real server's address say.
	Health map[netip.Addr]Health
	// Sessions are, of a director, its BGP sessions, by the router's address.
	Sessions map[netip.Addr]bool
	// TableSize is, of a director, the number of slots of its kernel's Maglev tables; 0 is not known.
	TableSize int
	// Withdrawn4 and Withdrawn6 say, of a director, that it announces no VIP of the family though it could.
	Withdrawn4, Withdrawn6 bool
	// Dark says, of a director, that it is not to attract packets at all.
	Dark bool
	// Unheard says, of a director, that the source of its inputs does not answer: it is the source's count of changes (a
	// resourceVersion of Kubernetes) of the inputs that it goes on with, 1 where that is not known; 0 is not so.
	Unheard uint64
	// Redirects are, of a realserver, the services whose redirect is in place. nil says nothing.
	Redirects map[ServiceKey]bool
}

// Attracts reports whether a director that says so attracts packets for VIPs of IPv4, or of IPv6.
func (r Report) Attracts(ipv4 bool) bool {
	return !r.Dark && r.SessionUp() && (ipv4 && !r.Withdrawn4 || !ipv4 && !r.Withdrawn6)
}

// SessionUp reports whether a director has a BGP session that is up.
func (r Report) SessionUp() bool {
	for _, up := range r.Sessions {
		if up {
			return true
		}
	}
	return false
}

// ServiceReport is what a director says of one service. All three are hashes, which mean something only by being equal.
type ServiceReport struct {
	// Wish is of the real servers and weights that its inputs ask for.
	Wish uint64
	// Table is of all that its kernel's Maglev table comes from (list order, last weights, flags, table size), as read
	// back; 0 is not known.
	Table uint64
	// Available is of the set of real servers that take new flows, as read back; 0 is not known.
	Available uint64
}

// Health is what probes of a real server say.
type Health uint8

const (
	// Unprobed says nothing.
	Unprobed Health = iota
	// Healthy answers as it should.
	Healthy
	// Refused is a host whose kernel answers that nobody listens (RST, port unreachable): the host lives, its agent does not.
	Refused
	// Silent does not answer at all.
	Silent
)

var healths = []string{"unprobed", "healthy", "refused", "silent"}

// String returns "unprobed", "healthy", "refused" or "silent".
func (h Health) String() string { return healths[min(int(h), len(healths)-1)] }

// MarshalText writes String.
func (h Health) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads what String writes.
func (h *Health) UnmarshalText(b []byte) error {
	i := slices.Index(healths, string(b))
	if i < 0 {
		return fmt.Errorf("health %q: want one of %v", b, healths)
	}
	*h = Health(i)
	return nil
}

// Register is a setting of the whole fleet, such as that it is frozen or that a node is drained: the last that was
// written counts.
type Register struct {
	Stamp uint64 `json:"stamp"` // one above all that its author knew of this register
	Value string `json:"value"` // empty is as if never set
	By    string `json:"by"`    // the member that wrote it
}

// Names of registers.
const (
	// FreezeRegister is "on" while the fleet holds its last state.
	FreezeRegister = "freeze"
	// DrainRegisterPrefix and the name of a director or node are "on" while that is drained.
	DrainRegisterPrefix = "drain/"
)

// Frozen reports whether the fleet is to hold its last state.
func (f Fleet) Frozen() bool { return f.Registers[FreezeRegister].Value == "on" }

// Drained reports whether a director or node is drained by hand.
func (f Fleet) Drained(name string) bool { return f.Registers[DrainRegisterPrefix+name].Value == "on" }

// AllDrained are the names of all directors and nodes that are drained by hand, each with the member that did it.
func (f Fleet) AllDrained() map[string]string {
	drained := map[string]string{}
	for register, r := range f.Registers {
		if name, is := strings.CutPrefix(register, DrainRegisterPrefix); is && f.Drained(name) {
			drained[name] = r.By
		}
	}
	return drained
}
