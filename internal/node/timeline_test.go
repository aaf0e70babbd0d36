package node

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
)

var (
	vip1 = netip.MustParseAddr("192.0.2.1")
	vip2 = netip.MustParseAddr("2001:db8::2")
)

// state is a wanted state in a few words: "192.0.2.1:80 a=2 b=1; route 192.0.2.1". A real server is a letter.
func state(t *testing.T, text string) ravel.State {
	t.Helper()
	var s ravel.State
	for part := range strings.SplitSeq(text, ";") {
		words := strings.Fields(part)
		if len(words) == 0 {
			continue
		}
		if words[0] == "route" {
			vip := netip.MustParseAddr(words[1])
			s.Routes = append(s.Routes, ravel.Route{Prefix: netip.PrefixFrom(vip, vip.BitLen()), NeedsAll: len(words) > 2})
			continue
		}
		at := netip.MustParseAddrPort(words[0])
		v := ravel.VirtualService{Key: ravel.ServiceKey{VIP: at.Addr(), Proto: ravel.TCP, Port: at.Port()}, Scheduler: ravel.MH}
		for _, w := range words[1:] {
			var rs ravel.RealServer
			if n, err := fmt.Sscanf(w[2:], "%d/%d", &rs.Weight, &rs.LastWeight); n == 0 {
				t.Fatal(err)
			}
			rs.LastWeight = max(rs.LastWeight, rs.Weight)
			rs.Addr = server(w[0], at.Addr())
			v.RealServers = append(v.RealServers, rs)
		}
		v.Coming = !v.TakesNewFlows() && slices.ContainsFunc(v.RealServers, func(rs ravel.RealServer) bool { return rs.LastWeight == 0 })
		s.Services = append(s.Services, v)
		if a := (ravel.Addr{VIP: at.Addr()}); len(s.Addrs) == 0 || s.Addrs[len(s.Addrs)-1] != a {
			s.Addrs = append(s.Addrs, a)
		}
	}
	return s
}

func server(letter byte, vip netip.Addr) netip.Addr {
	if vip.Is4() {
		return netip.AddrFrom4([4]byte{10, 0, 0, letter})
	}
	return netip.AddrFrom16([16]byte{0xfd, 15: letter})
}

// words is the opposite of state.
func words(s ravel.State) string {
	var parts []string
	for _, v := range s.Services {
		part := netip.AddrPortFrom(v.Key.VIP, v.Key.Port).String()
		for _, rs := range v.RealServers {
			letter := rs.Addr.AsSlice()
			part += fmt.Sprintf(" %c=%d", letter[len(letter)-1], rs.Weight)
			if rs.LastWeight != rs.Weight {
				part += fmt.Sprintf("/%d", rs.LastWeight)
			}
		}
		parts = append(parts, part)
	}
	for _, r := range s.Routes {
		part := "route " + r.Prefix.Addr().String()
		if r.NeedsAll {
			part += " all"
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, "; ")
}

func TestTimeline(t *testing.T) {
	type moment struct {
		at        int    // seconds
		want      string // wanted state
		announced string // VIPs that are announced when asked
		eff       string
		addrs     int
		wake      int // seconds; -1 is never
	}
	tests := []struct {
		name       string
		programmed string
		moments    []moment
	}{
		{"a new service comes when it takes flows", "", []moment{
			{0, "192.0.2.1:80 a=0 b=0", "", "", 1, -1},
			{1, "192.0.2.1:80 a=1 b=0; route 192.0.2.1", "", "192.0.2.1:80 a=1 b=0; route 192.0.2.1", 1, -1},
		}},
		{"one that is there stays, also when all that should take its flows are new", "192.0.2.1:80 a=0/1", []moment{
			{0, "192.0.2.1:80 a=0/1 b=0", "", "192.0.2.1:80 a=0/1 b=0", 1, -1},
		}},
		{"a removed VIP lingers as it was, then goes", "192.0.2.1:80 a=1", []moment{
			{0, "", "192.0.2.1", "192.0.2.1:80 a=1", 1, 2},
			{1, "", "", "192.0.2.1:80 a=1", 1, 2},
			{2, "", "", "", 0, -1},
		}},
		{"a re-add in the linger costs nothing", "192.0.2.1:80 a=1; 192.0.2.1:81 a=1", []moment{
			{0, "", "192.0.2.1", "192.0.2.1:80 a=1; 192.0.2.1:81 a=1", 1, 2},
			{1, "192.0.2.1:80 a=1; route 192.0.2.1", "", "192.0.2.1:80 a=1; route 192.0.2.1", 1, -1},
		}},
		{"a VIP that loses its last real server is withdrawn, and served as it was for the linger", "192.0.2.1:80 a=1", []moment{
			{0, "192.0.2.1:80 a=0/1", "192.0.2.1", "192.0.2.1:80 a=1", 1, 2},
			{2, "192.0.2.1:80 a=0/1", "", "192.0.2.1:80 a=0/1", 1, -1},
		}},
		{"a VIP that was never announced needs no linger", "192.0.2.1:80 a=1", []moment{
			{0, "", "", "", 0, -1},
		}},
		{"one VIP's linger blocks nothing else", "192.0.2.1:80 a=1; [2001:db8::2]:80 a=1", []moment{
			{0, "[2001:db8::2]:80 a=5; route 2001:db8::2", "192.0.2.1 2001:db8::2",
				"192.0.2.1:80 a=1; [2001:db8::2]:80 a=5; route 2001:db8::2", 2, 2},
		}},
		{"a VIP whose flows move to another service is withdrawn in between", "192.0.2.1:80 a=1; 192.0.2.1:81 a=0", []moment{
			{0, "192.0.2.1:81 b=1; route 192.0.2.1", "192.0.2.1", "192.0.2.1:80 a=1; 192.0.2.1:81 a=0", 1, 2},
			{2, "192.0.2.1:81 b=1; route 192.0.2.1", "", "192.0.2.1:81 b=1; route 192.0.2.1", 1, -1},
		}},
		{"announce all: a new service comes when it takes flows, and the VIP stays", "192.0.2.1:80 a=1", []moment{
			{0, "192.0.2.1:80 a=1; 192.0.2.1:81 a=0; route 192.0.2.1 all", "192.0.2.1",
				"192.0.2.1:80 a=1; route 192.0.2.1 all", 1, -1},
			{1, "192.0.2.1:80 a=1; 192.0.2.1:81 a=1; route 192.0.2.1 all", "192.0.2.1",
				"192.0.2.1:80 a=1; 192.0.2.1:81 a=1; route 192.0.2.1 all", 1, -1},
		}},
		{"a swap that is taken back in the linger costs nothing", "192.0.2.1:80 a=1; 192.0.2.1:81 a=0", []moment{
			{0, "192.0.2.1:81 b=1; route 192.0.2.1", "192.0.2.1", "192.0.2.1:80 a=1; 192.0.2.1:81 a=0", 1, 2},
			{1, "192.0.2.1:80 a=1; 192.0.2.1:81 a=0; route 192.0.2.1", "", "192.0.2.1:80 a=1; 192.0.2.1:81 a=0; route 192.0.2.1", 1, -1},
		}},
		{"announce all waits for a service that is there and has nobody yet", "192.0.2.1:80 a=1; 192.0.2.1:81", []moment{
			{0, "192.0.2.1:80 a=1; 192.0.2.1:81 a=0; route 192.0.2.1 all", "", "192.0.2.1:80 a=1; 192.0.2.1:81 a=0", 1, -1},
			{1, "192.0.2.1:80 a=1; 192.0.2.1:81 a=1; route 192.0.2.1 all", "",
				"192.0.2.1:80 a=1; 192.0.2.1:81 a=1; route 192.0.2.1 all", 1, -1},
		}},
	}
	epoch := time.Unix(1_000_000, 0)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			line := newTimeline(2*time.Second, state(t, test.programmed).Services)
			for _, m := range test.moments {
				announced := map[netip.Addr]bool{}
				for _, vip := range strings.Fields(m.announced) {
					announced[netip.MustParseAddr(vip)] = true
				}
				eff, wake := line.effective(state(t, m.want), announced, epoch.Add(time.Duration(m.at)*time.Second))
				var held []ravel.ServiceKey
				for _, s := range eff.Services {
					held = append(held, s.Key)
				}
				line.programmed(eff.Services, held)
				if diff := cmp.Diff(m.eff, words(eff)); diff != "" {
					t.Fatalf("at %d s (-want +got):\n%s", m.at, diff)
				}
				if len(eff.Addrs) != m.addrs {
					t.Fatalf("at %d s: %d addresses %v, want %d", m.at, len(eff.Addrs), eff.Addrs, m.addrs)
				}
				at := -1
				if !wake.IsZero() {
					at = int(wake.Sub(epoch).Seconds())
				}
				if at != m.wake {
					t.Fatalf("at %d s: wakes at %d s, want %d", m.at, at, m.wake)
				}
			}
		})
	}
}
