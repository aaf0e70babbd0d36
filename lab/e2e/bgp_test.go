package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/bgp"
	"github.com/ravel-lb/ravel/lab/stage"
)

// path is one way to a VIP as a router of FRR tells it.
type path struct {
	Valid     bool
	ASPath    struct{ String string }
	Community struct{ String string }
	NextHops  []struct {
		IP    string
		Scope string
	}
}

// vtysh asks a router.
func vtysh(ctx context.Context, s *stage.Stage, router string, commands ...string) (string, error) {
	args := []string{"vtysh"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	return s.Output(ctx, router, args...)
}

// paths returns what a router's BGP knows of a VIP.
func paths(t *testing.T, s *stage.Stage, router string, vip netip.Addr) []path {
	t.Helper()
	family := "ipv4"
	if vip.Is6() {
		family = "ipv6"
	}
	out, err := vtysh(within(t, 20*time.Second), s, router, fmt.Sprintf("show bgp %s unicast %s/%d json", family, vip, vip.BitLen()))
	must(t, err)
	var answer struct{ Paths []path }
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		t.Fatalf("%s: %v: %s", router, err, out)
	}
	return answer.Paths
}

// neighbor is a director as a router of FRR tells it.
type neighbor struct {
	BGPState                       string
	BGPTimerHoldTimeMsecs          int
	BGPTimerKeepAliveIntervalMsecs int
	LastResetDueTo                 string
	LastNotificationReason         string
	ConnectionsEstablished         int
}

func askNeighbor(ctx context.Context, s *stage.Stage, router, director string) (neighbor, error) {
	out, err := vtysh(ctx, s, router, "show bgp neighbors "+director+" json")
	if err != nil {
		return neighbor{}, err
	}
	var answer map[string]neighbor
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return neighbor{}, fmt.Errorf("%w: %s", err, out)
	}
	return answer[director], nil
}

// peersOf is `ravel peers -o json`.
func peersOf(t *testing.T, s *stage.Stage, node string, code int) bgp.Status {
	t.Helper()
	var status bgp.Status
	if out := ravelSays(t, s, node, code, "peers", "-o", "json"); json.Unmarshal([]byte(out), &status) != nil {
		t.Fatalf("%s: ravel peers -o json is not JSON:\n%s", node, out)
	}
	return status
}

// What the routers hear of a VIP: from each director one path, with its communities and the director's own address.
func TestRoutersHearEachDirector(t *testing.T) {
	s := fleet(t)
	for _, router := range stage.Routers() {
		for _, vip := range vips {
			want := []string{"10.1.0.11", "10.1.0.12", "10.1.0.13"}
			if vip.Is6() {
				want = []string{"fd00:1::11", "fd00:1::12", "fd00:1::13"}
			}
			var hops []string
			for _, p := range paths(t, s, router, vip) {
				if p.ASPath.String != "65100" {
					continue // by way of the other router
				}
				if !p.Valid || p.Community.String != "65100:120" {
					t.Errorf("%s, %s: valid %t, community %q, want 65100:120", router, vip, p.Valid, p.Community.String)
				}
				for _, n := range p.NextHops {
					if n.Scope != "link-local" {
						hops = append(hops, n.IP)
					}
				}
			}
			slices.Sort(hops)
			if !slices.Equal(hops, want) {
				t.Errorf("%s: the directors' next hops for %s are %v, want %v", router, vip, hops, want)
			}
		}
		for _, director := range []string{"10.1.0.11", "10.1.0.12", "10.1.0.13"} {
			n, err := askNeighbor(t.Context(), s, router, director)
			must(t, err)
			if n.BGPState != "Established" || n.BGPTimerHoldTimeMsecs != 3000 || n.BGPTimerKeepAliveIntervalMsecs != 1000 {
				t.Errorf("%s: the session to %s: %+v, want a hold time of 3 s", router, director, n)
			}
		}
	}
	for _, d := range s.Directors() {
		status := peersOf(t, s, d, 0)
		if len(status.Peers) != 2 || len(status.Announced) != 2 || status.Desired != 2 {
			t.Errorf("%s: %d peers, %v announced of %d, want 2 each", d, len(status.Peers), status.Announced, status.Desired)
		}
		for _, p := range status.Peers {
			if !p.Established() || p.HoldTime != 3 || p.LocalASN != 65100 || p.Sent != 2 || p.Received != 0 {
				t.Errorf("%s: %+v", d, p)
			}
		}
	}
}

// A director that hangs is forgotten within the hold time, and comes back by itself.
func TestHungDirectorIsForgotten(t *testing.T) {
	s := fleet(t)
	must(t, s.Process("d3").Signal(syscall.SIGSTOP))
	t.Cleanup(func() { must(t, s.Process("d3").Signal(syscall.SIGCONT)) })
	began := time.Now()
	must(t, s.WaitHops(within(t, 15*time.Second), stage.Routers(), vips, 2))
	// FRR looks at its timers once a second.
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the routers forgot it after %s, with a hold time of 3 s", took)
	}
	must(t, s.Process("d3").Signal(syscall.SIGCONT))
	must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 3))
}

// A dark start: everything is programmed and shown, nothing is announced.
func TestAttractNoneAnnouncesNothing(t *testing.T) {
	s := fleet(t)
	restart(t, s, "d3", "--attract", "none")
	must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 2))
	for _, vip := range vips {
		eventually(t, 20*time.Second, func() error {
			out, err := s.Ravel(t.Context(), "d3", "vips")
			if err != nil {
				return fmt.Errorf("ravel vips: %w\n%s", err, out)
			}
			for line := range strings.Lines(out) {
				words := strings.Fields(line)
				if len(words) > 5 && words[0] == vip.String() && words[1] == "no" && words[2] == "yes" && strings.HasSuffix(line, "--attract=none\n") {
					return nil
				}
			}
			return fmt.Errorf("ravel vips does not say that %s is held and why it is not announced:\n%s", vip, out)
		})
	}
	if out := ravelSays(t, s, "d3", 0, "services"); !strings.Contains(out, stage.VIP4.String()) || !strings.Contains(out, stage.VIP6.String()) {
		t.Errorf("ravel services:\n%s", out)
	}
	ipvs, addresses := on(t, s, "d3", "ipvsadm", "-Sn"), on(t, s, "d3", "ip", "-oneline", "address", "show", "dev", "ravel0")
	for _, vip := range vips {
		if !strings.Contains(ipvs, vip.String()) || !strings.Contains(addresses, vip.String()+"/") {
			t.Errorf("%s is not programmed:\n%s\n%s", vip, ipvs, addresses)
		}
	}
	// It serves whoever sends to it.
	rack, via := neighbour(t, s)
	via(t, netip.MustParseAddr("10.1.0.13"), netip.MustParseAddr("fd00:1::13"))
	for _, vip := range vips {
		eventually(t, 10*time.Second, func() error {
			_, err := knock(s, rack, "tcp", vip, 80, 3*time.Second)
			return err
		})
	}
	// Also after changes, and never a route.
	must(t, s.Change(func(d *stage.Document) { d.Services[0].Scheduler = "wlc" }))
	eventually(t, 20*time.Second, func() error {
		if out := on(t, s, "d3", "ipvsadm", "-Sn"); !strings.Contains(out, "198.51.100.20:80 -s wlc") {
			return fmt.Errorf("the change is not programmed:\n%s", out)
		}
		return nil
	})
	if status := peersOf(t, s, "d3", 0); len(status.Announced) != 0 || status.Desired != 0 {
		t.Errorf("it announces %v", status.Announced)
	}
	for _, router := range stage.Routers() {
		for _, vip := range vips {
			for _, p := range paths(t, s, router, vip) {
				for _, hop := range p.NextHops {
					if strings.HasSuffix(hop.IP, "::13") || hop.IP == "10.1.0.13" {
						t.Errorf("%s knows %s by %s", router, vip, hop.IP)
					}
				}
			}
		}
	}
}

// ravel peers says which session is down, and why; and where no director runs, that.
func TestPeersTellsWhatIsWrong(t *testing.T) {
	s := fleet(t)
	shutdown := func(no string) {
		t.Helper()
		_, err := vtysh(within(t, 20*time.Second), s, "tor1", "configure terminal", "router bgp 65001", no+"neighbor 10.1.0.11 shutdown")
		must(t, err)
	}
	shutdown("")
	t.Cleanup(func() { shutdown("no ") })
	must(t, s.WaitHops(within(t, 10*time.Second), []string{"tor1"}, vips[:1], 2))
	var out string
	eventually(t, 10*time.Second, func() error {
		var err error
		out, err = s.Ravel(t.Context(), "d1", "peers")
		if code, err := exitCode(err); err != nil || code != 4 {
			return fmt.Errorf("ravel peers: exit code %d, %w, want 4:\n%s", code, err, out)
		}
		return nil
	})
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 3 {
		t.Fatalf("ravel peers prints\n%s", out)
	}
	for _, word := range []string{"10.1.0.2", "65001", "ago"} {
		if !strings.Contains(lines[1], word) {
			t.Errorf("ravel peers does not say %q of the session that is down:\n%s", word, out)
		}
	}
	if strings.Contains(lines[1], "Established") || !strings.Contains(lines[2], "Established") || !strings.HasPrefix(lines[2], "10.1.0.3 ") {
		t.Errorf("ravel peers:\n%s", out)
	}
	if !strings.Contains(strings.ToLower(out), "shutdown") {
		t.Errorf("ravel peers does not say why the session is down:\n%s", out)
	}
	status := peersOf(t, s, "d1", 4)
	if p := status.Peers[0]; p.Established() || p.LastError == "" || time.Since(p.LastErrorAt) > time.Minute || p.HoldTime != 0 {
		t.Errorf("ravel peers -o json: %+v", p)
	}
	if out := ravelSays(t, s, "d1", 4, "peers", "-o", "wide"); !strings.Contains(out, "HOLD") || !strings.Contains(out, "FLAPS") {
		t.Errorf("ravel peers -o wide:\n%s", out)
	}
	ravelSays(t, s, "d1", 2, "peers", "-o", "xml")
	// The other router's view is whole: one session is enough.
	must(t, s.WaitHops(within(t, 10*time.Second), []string{"tor2"}, vips, 3))

	for _, node := range []string{"c1", "r1"} { // no ravel at all; a realserver
		if out := ravelSays(t, s, node, 3, "peers"); !strings.Contains(out, "no director runs here") {
			t.Errorf("%s: ravel peers:\n%s", node, out)
		}
	}
	shutdown("no ")
	must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 3))
	eventually(t, 10*time.Second, func() error {
		out, err := s.Ravel(t.Context(), "d1", "peers")
		if err != nil {
			return fmt.Errorf("after the session came back: %w:\n%s", err, out)
		}
		return nil
	})
	if p := peersOf(t, s, "d1", 0).Peers[0]; p.LastError == "" || p.Flaps == 0 {
		t.Errorf("ravel peers has forgotten why the session was down: %+v", p)
	}
}

// A planned stop withdraws, serves on for a moment, and then says why it goes.
func TestPlannedStopWithdrawsFirst(t *testing.T) {
	s := fleet(t)
	restart(t, s, "d2", "--stop-wait", "8s")
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 3))
	load := startSteady(t, s)
	before, err := askNeighbor(t.Context(), s, "tor1", "10.1.0.12")
	must(t, err)

	must(t, s.Process("d2").Signal(syscall.SIGTERM))
	// The routes go while the session is up.
	must(t, s.WaitHops(within(t, 10*time.Second), stage.Routers(), vips, 2))
	for _, router := range stage.Routers() {
		n, err := askNeighbor(t.Context(), s, router, "10.1.0.12")
		must(t, err)
		if n.BGPState != "Established" || n.ConnectionsEstablished != before.ConnectionsEstablished && router == "tor1" {
			t.Errorf("%s has lost the routes and the session with them: %+v", router, n)
		}
	}
	for _, router := range stage.Routers() {
		for _, vip := range vips {
			for _, p := range paths(t, s, router, vip) {
				for _, hop := range p.NextHops {
					if strings.HasSuffix(hop.IP, "::12") || hop.IP == "10.1.0.12" {
						t.Errorf("%s still knows %s by %s", router, vip, hop.IP)
					}
				}
			}
		}
	}
	select {
	case <-s.Process("d2").Done():
	case <-time.After(20 * time.Second):
		t.Fatal("a planned stop takes longer than 20 s")
	}
	must(t, s.Process("d2").Stop(within(t, time.Second))) // it exited with 0
	for _, router := range stage.Routers() {
		eventually(t, 10*time.Second, func() error {
			n, err := askNeighbor(t.Context(), s, router, "10.1.0.12")
			if err == nil && (n.BGPState == "Established" || !strings.Contains(n.LastNotificationReason, "Cease/Administrative Shutdown")) {
				err = fmt.Errorf("%s: the session ended as %+v, want Cease/Administrative Shutdown", router, n)
			}
			return err
		})
		// RFC 9003: who goes.
		if out := on(t, s, router, "grep", "NOTIFICATION: received from neighbor 10.1.0.12", "/tmp/frr.log"); !strings.Contains(out, "planned stop of director d2") {
			t.Errorf("%s does not know who goes:\n%s", router, out)
		}
	}
	// The kernel serves on what may still come.
	if out := on(t, s, "d2", "ipvsadm", "-Sn"); !strings.Contains(out, stage.VIP4.String()+":80") || !strings.Contains(out, stage.VIP6.String()) {
		t.Errorf("a planned stop emptied IPVS:\n%s", out)
	}
	load.unbroken(t, "during a planned stop")
}
