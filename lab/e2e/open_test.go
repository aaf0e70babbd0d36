//go:build e2e_open

package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/lab/stage"
)

// A VIP that is removed and comes back within the linger has lost nothing: no packet that reached a director, no
// connection entry, no flow.
func TestReAddWithinLinger(t *testing.T) {
	s := fleet(t)
	setBrief(t, s, true)
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), brief, len(s.Directors())))
	watchers := watchRemoval(t, s)
	waitBrief(t, watchers)
	client := briefLoad(t, s, "again", 0)
	captures := map[string]*capture{}
	for _, d := range s.Directors() {
		captures[d] = captureAt(t, s, d, "eth1", brief)
	}
	before := map[string][]string{}
	entries := 0
	for _, d := range s.Directors() {
		before[d] = connections(t, s, d)
		entries += len(before[d])
	}
	if entries < 30 {
		t.Fatalf("%d connection entries, want one for each of 30 flows at least", entries)
	}
	_, err := client.Reset(within(t, 10*time.Second))
	must(t, err)

	removed := time.Now()
	setBrief(t, s, false)
	must(t, s.WaitHops(within(t, linger), stage.Routers(), brief, 0))
	setBrief(t, s, true)
	if away := time.Since(removed); away > linger-200*time.Millisecond {
		t.Fatalf("the routers took %s to lose the route: the test shows nothing", away)
	}
	t.Logf("removed for %s", time.Since(removed).Round(time.Millisecond))
	must(t, s.WaitHops(within(t, 10*time.Second), stage.Routers(), brief, len(s.Directors())))
	eventually(t, 20*time.Second, func() error { return allAnswer(t, client) })
	// Past the time at which the linger would have ended, and the realservers' too.
	eventually(t, 20*time.Second, func() error {
		if left := 8*time.Second - time.Since(removed); left > 0 {
			return fmt.Errorf("%s left", left)
		}
		return allAnswer(t, client)
	})
	report, err := client.Report(within(t, 10*time.Second))
	must(t, err)
	for _, f := range report.Flows {
		if f.Open != f.Count || f.OtherPod > 0 || len(f.Broken) > 0 {
			t.Errorf("the flows to %s: %d of %d open, broken %v, %d answers of other pods: %q", f.Name, f.Open, f.Count, f.Broken, f.OtherPod, f.Examples)
		}
	}
	for where, p := range watchers {
		p.end()
		if slices.Contains(append(stage.Routers(), "spine"), where.node) {
			continue
		}
		if history, _ := p.history(t); len(history) != 1 {
			var answers []string
			for _, c := range history {
				answers = append(answers, fmt.Sprintf("%q", c.answer))
			}
			t.Errorf("%s had of %s one after the other: %s", where.node, where.vip, strings.Join(answers, ", "))
		}
	}
	for d, c := range captures {
		after := connections(t, s, d)
		for _, entry := range before[d] {
			if !slices.Contains(after, entry) {
				t.Errorf("%s lost the connection entry %s", d, entry)
			}
		}
		ended := time.Now()
		c.end()
		waiting := map[flow][]frame{}
		for _, f := range c.frames() {
			switch flow := f.flow(); {
			case !slices.Contains(brief, f.dst.Addr()):
			case f.out:
				waiting[flow] = waiting[flow][min(1, len(waiting[flow])):]
			case f.dstMAC == c.mac:
				waiting[flow] = append(waiting[flow], f)
			}
		}
		for _, frames := range waiting {
			for _, f := range frames {
				if f.at.After(ended) {
					continue // it may still be on its way
				}
				t.Errorf("%s, %s after the removal, did not pass on: %s", d, f.at.Sub(removed).Round(time.Millisecond), f)
			}
		}
	}
}

// connections lists the connection entries of the brief VIPs on a director: client, VIP, real server.
func connections(t *testing.T, s *stage.Stage, node string) []string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/ip_vs_conn", s.Fleet.Node(node).PID()))
	must(t, err)
	var entries []string
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) < 8 || words[0] != "TCP" {
			continue
		}
		a, ok := procAddr(words[3])
		if ok && slices.Contains(brief, a) {
			entries = append(entries, strings.Join(words[:7], " "))
		}
	}
	return entries
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
