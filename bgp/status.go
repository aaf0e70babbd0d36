package bgp

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"time"

	api "github.com/osrg/gobgp/v3/api"
)

// Status is what an operator asks about. It marshals to JSON.
type Status struct {
	Running  bool       `json:"running"`           // false until some Apply had peers
	RouterID netip.Addr `json:"routerId,omitzero"` // the BGP identifier in use
	// RouterIDWanted is another identifier that is asked for while RouterID is in use: it takes a restart. Zero if none.
	RouterIDWanted netip.Addr     `json:"routerIdWanted,omitzero"`
	Desired        int            `json:"routesDesired"`    // routes that the last Apply wanted
	Announced      []netip.Prefix `json:"routesAnnounced"`  // what the table holds of ours, sorted
	Changed        time.Time      `json:"changed,omitzero"` // when a route or a peer last changed
	Fault          string         `json:"fault,omitempty"`  // a fault inside GoBGP itself; the speaker should be restarted
	Peers          []PeerStatus   `json:"peers"`            // every wanted peer, by address
}

// PeerStatus is one session.
type PeerStatus struct {
	Addr     netip.Addr `json:"addr"`
	Port     uint16     `json:"port"`
	ASN      uint32     `json:"asn"`
	LocalASN uint32     `json:"localAsn"`
	// State is Idle, Active, OpenSent, OpenConfirm or Established (RFC 4271 section 8.2.2). In Active, GoBGP dials.
	State string `json:"state"`
	// Since is when State began; Uptime is how long an established session has lasted, in seconds, else 0.
	Since  time.Time `json:"since"`
	Uptime int64     `json:"uptimeSeconds"`
	// HoldTime is what both sides agreed on, in seconds; 0 while the session is not established.
	HoldTime int64 `json:"holdTimeSeconds"`
	// Families are those that both sides carry: "ipv4", "ipv6". None while the session is not established.
	Families []string `json:"families"`
	// Sent counts our routes that the router has; Received those that it sent us, all of them refused.
	Sent     uint64 `json:"routesSent"`
	Received uint64 `json:"routesReceived"`
	Updates  uint64 `json:"updatesSent"` // UPDATE messages since the peer was first wanted
	// Flaps counts the ends of an established session that were not by our own hand.
	Flaps uint64 `json:"flaps"`
	// LastError says why the session last ended or did not come up, also when it is up again since.
	LastError   string    `json:"lastError,omitempty"`
	LastErrorAt time.Time `json:"lastErrorAt,omitzero"`
}

// Established reports whether the session is up.
func (p PeerStatus) Established() bool { return p.State == string(established) }

// Status returns what every session does now. It does not wait for an Apply that runs, beyond one of its steps.
func (s *Speaker) Status(ctx context.Context) (Status, error) {
	st := Status{Announced: s.Announced()}
	s.view.Lock()
	gobgp := s.view.gobgp
	st.Running, st.RouterID, st.Desired, st.Changed = gobgp != nil, s.view.routerID, s.view.desired, s.view.changed
	if asked := s.view.askedID; st.Running && asked.IsValid() && asked != st.RouterID {
		st.RouterIDWanted = asked
	}
	s.view.Unlock()
	st.Peers, st.Fault = s.sessions.status(time.Now())
	if gobgp == nil {
		return st, nil
	}
	err := gobgp.list(ctx, func(p *api.Peer) {
		addr, err := netip.ParseAddr(p.GetConf().GetNeighborAddress())
		if err != nil {
			return
		}
		i, found := slices.BinarySearchFunc(st.Peers, addr, func(p PeerStatus, a netip.Addr) int { return p.Addr.Compare(a) })
		if found && st.Peers[i].Established() {
			st.Peers[i].count(p)
		}
	})
	return st, err
}

// Sessions are the wanted sessions, by the router's address: whether they are established.
func (s *Speaker) Sessions() map[netip.Addr]bool {
	s.sessions.mu.Lock()
	defer s.sessions.mu.Unlock()
	up := make(map[netip.Addr]bool, len(s.sessions.table))
	for addr, session := range s.sessions.table {
		up[addr] = session.state == established
	}
	return up
}

// count takes over what only GoBGP knows of an established session.
func (p *PeerStatus) count(from *api.Peer) {
	p.HoldTime = int64(from.GetTimers().GetState().GetNegotiatedHoldTime())
	both := map[api.Family_Afi]bool{}
	for _, capability := range from.GetState().GetRemoteCap() {
		var mp api.MultiProtocolCapability
		if capability.MessageIs(&mp) && capability.UnmarshalTo(&mp) == nil &&
			mp.GetFamily().GetSafi() == api.Family_SAFI_UNICAST {
			both[mp.GetFamily().GetAfi()] = true
		}
	}
	if len(both) == 0 {
		both[api.Family_AFI_IP] = true // RFC 4760 section 8: without the capability it is IPv4 unicast
	}
	for _, family := range from.GetAfiSafis() {
		afi := family.GetConfig().GetFamily().GetAfi()
		if !both[afi] {
			continue
		}
		name := "ipv4"
		if afi == api.Family_AFI_IP6 {
			name = "ipv6"
		}
		p.Families = append(p.Families, name)
		p.Sent += family.GetState().GetAdvertised()
		p.Received += family.GetState().GetReceived()
	}
}

// status copies the table, sorted by address.
func (t *sessions) status(now time.Time) (peers []PeerStatus, fault string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	peers = make([]PeerStatus, 0, len(t.table))
	for addr, s := range t.table {
		p := PeerStatus{
			Addr: addr, Port: cmp.Or(s.peer.Port, bgpPort), ASN: s.peer.ASN, LocalASN: s.peer.LocalASN,
			State: string(s.state), Since: s.since, Families: []string{},
			Updates: s.updates, Flaps: s.flaps, LastError: s.lastError, LastErrorAt: s.lastErrorAt,
		}
		if s.state == established {
			p.Uptime = int64(now.Sub(s.since) / time.Second)
		}
		peers = append(peers, p)
	}
	slices.SortFunc(peers, func(a, b PeerStatus) int { return a.Addr.Compare(b.Addr) })
	return peers, t.fatal
}
