package main

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/bgp"
)

// At its start a director is ready with all of its sessions, later with one; one that is drained is not.
func TestReadyDirector(t *testing.T) {
	r := newRig(t, ravel.Director)
	r.know()
	peers := []ravel.Peer{{Addr: netip.MustParseAddr("10.0.0.252")}, {Addr: netip.MustParseAddr("10.0.0.253")}}
	c, _ := r.p.computed.Latest()
	c.state.Peers = peers
	r.p.computed.Set(c)
	up := 0
	ready := r.p.attracting(func() (s bgp.Status, err error) {
		for i, p := range peers {
			state := "Active"
			if i < up {
				state = "Established"
			}
			s.Peers = append(s.Peers, bgp.PeerStatus{Addr: p.Addr, State: state})
		}
		return s, nil
	})
	want := func(what, part string) {
		t.Helper()
		switch err := ready(); {
		case part == "" && err != nil:
			t.Errorf("%s: %v", what, err)
		case part != "" && (err == nil || !strings.Contains(err.Error(), part)):
			t.Errorf("%s: %v, want %q", what, err, part)
		}
	}
	want("without a session", "BGP")
	up = 1
	want("at the start, with one of two", "1 of 2 BGP sessions")
	up = 2
	want("with both", "")
	up = 1
	want("later, with one", "")
	r.fleet.Registers[ravel.DrainRegisterPrefix+"d1"] = ravel.Register{Value: "on", By: "d2"}
	r.know()
	want("drained", "drained by d2")
}
