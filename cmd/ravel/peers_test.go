package main

import (
	"context"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/bgp"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/desired"
)

// An empty table is no answer where sessions should be.
func TestPeersSaysWhyThereIsNoSession(t *testing.T) {
	peer := netip.MustParseAddr("192.0.2.1")
	fleet := desired.Fleet{Directors: []desired.FleetDirector{{Name: "d1"}}}
	in := desired.Inputs{Node: "d1", Fleet: fleet}
	wants := ravel.State{Peers: []ravel.Peer{{Addr: peer}}}
	session := func(state string) []bgp.PeerStatus { return []bgp.PeerStatus{{Addr: peer, State: state}} }
	up := bgp.Status{Running: true, Peers: session("Established")}
	for _, test := range []struct {
		name   string
		c      computed
		status bgp.Status
		code   int
		says   string // on stderr
	}{
		{"well", computed{inputs: in, state: wants}, up, exitOK, ""},
		{"down", computed{inputs: in, state: wants}, bgp.Status{Running: true, Peers: session("Active")}, exitNotWell, ""},
		{"never started", computed{inputs: in, state: wants}, bgp.Status{}, exitNotWell,
			"ravel: BGP does not run here: it has not started, though peers are wanted: 192.0.2.1; see ravel check\n"},
		{"a session is missing", computed{inputs: in, state: wants}, bgp.Status{Running: true}, exitNotWell,
			"ravel: BGP has no session with wanted peers: 192.0.2.1; see ravel check\n"},
		{"no peers", computed{inputs: in}, bgp.Status{}, exitNotWell,
			"ravel: BGP does not run here: fleet.peers has none for this director, d1; see ravel check\n"},
		{"misnamed", computed{inputs: desired.Inputs{Node: "d2", Fleet: fleet}}, bgp.Status{}, exitNotWell,
			"ravel: BGP does not run here: this director, d2, is not in fleet.directors; see ravel check\n"},
		{"a fault", computed{inputs: in, state: wants}, bgp.Status{Running: true, Fault: "it broke", Peers: session("Established")}, exitNotWell,
			"ravel: BGP has a fault: it broke; see ravel check\n"},
		{"attracts nothing", computed{inputs: desired.Inputs{Node: "d2", Fleet: fleet, AttractNone: true}}, bgp.Status{}, exitOK,
			"ravel: this director announces nothing (--attract=none), so no session is needed\n"},
		{"attracts nothing, down", computed{inputs: desired.Inputs{Node: "d1", Fleet: fleet, AttractNone: true}, state: wants},
			bgp.Status{Running: true, Peers: session("Active")}, exitOK,
			"ravel: this director announces nothing (--attract=none), so no session is needed\n"},
		{"attracts nothing, up", computed{inputs: desired.Inputs{Node: "d1", Fleet: fleet, AttractNone: true}, state: wants}, up, exitOK, ""},
	} {
		socket := serve(t, map[string]admin.Query{
			"peers": func(context.Context) (any, error) { return answerPeers(test.status, test.c, true), nil },
		})
		for _, format := range []string{"table", "json"} {
			code, stdout, stderr := ravelWith("peers", "-o", format, "--admin-socket", socket)
			if code != test.code || stderr != test.says {
				t.Errorf("%s, -o %s: exit code %d, want %d, and says %q, want %q", test.name, format, code, test.code, stderr, test.says)
			}
			if format == "json" && !json.Valid([]byte(stdout)) || strings.Contains(stdout, "ravel:") {
				t.Errorf("%s, -o %s prints:\n%s", test.name, format, stdout)
			}
		}
	}
}
