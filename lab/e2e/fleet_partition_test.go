package e2e

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/lab/stage"
)

// wholeAgain is how soon all tables are alike after members hear one another again.
const wholeAgain = 15 * time.Second

// weigh gives the real servers of the document's service a number of pods each, of those that they have.
func weigh(t *testing.T, s *stage.Stage, pods map[string]int) {
	t.Helper()
	must(t, s.Change(func(d *stage.Document) {
		d.Endpoints = nil
		for _, p := range s.Pods {
			if pods[p.Node] > 0 {
				pods[p.Node]--
				d.Back("web", p)
			}
		}
	}))
}

// takersAre waits until a director's kernel has a weight for just these real servers.
func takersAre(t *testing.T, s *stage.Stage, d string, want ...string) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		for _, r := range s.Realservers() {
			n, err := weights(s, d, r)
			if err != nil || (n > 0) != slices.Contains(want, r) {
				return fmt.Errorf("%s: %s takes new flows of %d services, want those of %v: %w", d, r, n, want, err)
			}
		}
		return nil
	})
}

// The fleet falls apart into two: one director with two real servers, and the rest. Both parts serve on and take changes,
// nobody is found dead, and soon after they hear one another again all have the same tables and the changes of both.
// RAVEL_TEST_PARTITION is how long it lasts, in seconds.
func TestAPartitionHeals(t *testing.T) {
	s := fleet(t)
	load := startSteady(t, s)
	everybody(t, s, true)
	agree(t, s, 30*time.Second)
	t.Cleanup(func() {
		for _, r := range []string{"r1", "r3"} {
			ravelSays(t, s, "d2", 0, "drain", "--undo", r)
		}
	})
	began := time.Now()
	rest := []string{"d2", "d3", "r3", "r4"}
	var heals []func()
	for _, node := range []string{"d1", "r1", "r2"} {
		heals = append(heals, deafen(t, s, node, rest...))
	}
	lasts := time.Duration(number(t, "RAVEL_TEST_PARTITION", 20)) * time.Second
	eventually(t, 20*time.Second, func() error {
		var one, other membersOf
		if err := s.Ask(t.Context(), "d1", "members", &one); err != nil {
			return err
		}
		if err := s.Ask(t.Context(), "d2", "members", &other); err != nil {
			return err
		}
		if one.Majority || !other.Majority {
			return fmt.Errorf("d1 sees a majority: %t, d2: %t; want no and yes", one.Majority, other.Majority)
		}
		return nil
	})
	ravelSays(t, s, "d1", 0, "drain", "r1")
	ravelSays(t, s, "d2", 0, "drain", "r3")
	takersAre(t, s, "d1", "r2", "r3", "r4")
	takersAre(t, s, "d2", "r1", "r2", "r4")
	weigh(t, s, map[string]int{"r1": 1, "r2": 2, "r3": 2, "r4": 1})
	for time.Since(began) < lasts {
		nobodyDead(t, s, "during the partition", s.Directors()...)
		time.Sleep(time.Second)
	}
	must(t, s.WaitHops(within(t, 5*time.Second), stage.Routers(), vips, 3))
	load.unbroken(t, "during the partition")
	for _, heal := range heals {
		heal()
	}
	table := agree(t, s, wholeAgain)
	for _, d := range s.Directors() {
		takersAre(t, s, d, "r2", "r4")
	}
	var m membersOf
	must(t, s.Ask(t.Context(), "d3", "members", &m))
	if !maps.Equal(m.drained(), map[string]bool{"r1": true, "r3": true}) {
		t.Errorf("after the partition %v are drained, want r1 and r3", m.drained())
	}
	for _, vip := range vips {
		if text := table[tcpKey(vip)]; !strings.Contains(text, nodeAddr("r2", vip).String()+"=2/") || !strings.Contains(text, nodeAddr("r4", vip).String()+"=1/") {
			t.Errorf("the change during the partition is not in %s", text)
		}
	}
	nobodyDead(t, s, "after the partition", s.Directors()...)
	load.unbroken(t, "after the partition")
}

// A director that hears nobody and is heard by nobody serves on, follows its file and finds nobody dead.
func TestADirectorCutOffFromGossip(t *testing.T) {
	s := fleet(t)
	load := startSteady(t, s)
	everybody(t, s, true)
	heal := deafen(t, s, "d3")
	eventually(t, 20*time.Second, func() error {
		var m membersOf
		if err := s.Ask(t.Context(), "d3", "members", &m); err != nil {
			return err
		}
		if m.Majority {
			return fmt.Errorf("d3 still sees a majority: %+v", m)
		}
		return nil
	})
	weigh(t, s, map[string]int{"r1": 2, "r2": 1, "r3": 2, "r4": 3})
	for _, d := range s.Directors() {
		eventually(t, 20*time.Second, func() error {
			table, err := dump(t.Context(), s, d)
			if err == nil {
				err = asWanted(table, takers(s.Document(), nil))
			}
			return err
		})
	}
	time.Sleep(4 * time.Second)
	nobodyDead(t, s, "d3 is cut off", s.Directors()...)
	must(t, s.WaitHops(within(t, 5*time.Second), stage.Routers(), vips, 3))
	if out := peersOf(t, s, "d3", 0); len(out.Announced) != 2 {
		t.Errorf("cut off from gossip, d3 announces %v", out.Announced)
	}
	load.unbroken(t, "while d3 is cut off")
	heal()
	agree(t, s, wholeAgain)
	load.unbroken(t, "after d3 was cut off")
}

// Two directors are a fleet: either may be lost, the other one carries on, takes changes and finds the dead, because
// realservers vote with it.
func TestAFleetOfTwo(t *testing.T) {
	s := fleet(t)
	must(t, s.Process("d3").Stop(within(t, 30*time.Second)))
	must(t, s.Change(func(d *stage.Document) { d.Directors = []string{"d1", "d2"} }))
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 2))
	ready(t, s)
	agree(t, s, 30*time.Second)
	l := &longFlows{t: t, s: s}
	l.open(200)
	for _, lost := range []string{"d1", "d2"} {
		left := map[string]string{"d1": "d2", "d2": "d1"}[lost]
		before, broken := l.calm()
		powerOff(t, s, lost)
		must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 1))
		after, nowBroken := l.calm()
		if nowBroken > broken || len(lostFlows(before, after)) > 0 {
			t.Errorf("%d flows broke when %s was lost: %v before, %v after: %q", nowBroken-broken, lost, before, after, l.why)
		}
		var m membersOf
		must(t, s.Ask(within(t, 10*time.Second), left, "members", &m))
		if !m.Majority {
			t.Errorf("%s alone with four realservers sees no majority", left)
		}
		if lost == "d1" {
			must(t, s.Fleet.CutLink("r3", "eth1"))
			t.Cleanup(func() { must(t, s.Fleet.RestoreLink("r3", "eth1")) })
			takersAre(t, s, left, "r1", "r2", "r4")
			must(t, s.Fleet.RestoreLink("r3", "eth1"))
			takersAre(t, s, left, "r1", "r2", "r3", "r4")
			// The flows of r3 wait no longer than their patience.
			eventually(t, 40*time.Second, func() error {
				if _, _, silent := l.report(); silent > 0 {
					return fmt.Errorf("%d flows are silent", silent)
				}
				return nil
			})
		}
		powerOn(t, s, lost)
		must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 2))
		agree(t, s, 30*time.Second)
	}
}

// All of Ravel is killed everywhere at one moment, and starts again on what the kernels hold: nothing changes there, no
// flow breaks, and the routes are back as soon as the sessions are.
func TestTheWholeFleetRestarts(t *testing.T) {
	s := fleet(t)
	ready(t, s)
	everybody(t, s, true)
	agree(t, s, 30*time.Second)
	l := &longFlows{t: t, s: s}
	l.open(200)
	before, _ := l.calm()
	still := unchanged(t, s)
	nodes := append(s.Realservers(), s.Directors()...)
	for _, node := range nodes {
		must(t, s.Process(node).Kill())
	}
	for _, node := range nodes {
		must(t, s.Start(node))
	}
	began := time.Now()
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 3))
	t.Logf("all routes were back after %s", time.Since(began).Round(10*time.Millisecond))
	hops := poll(t, 50*time.Millisecond, func() (string, error) {
		var all []string
		for _, router := range stage.Routers() {
			for _, vip := range vips {
				h, err := s.NextHops(t.Context(), router, vip)
				if err != nil {
					return "", err
				}
				all = append(all, h...)
			}
		}
		return strings.Join(all, " "), nil
	})
	everybody(t, s, true)
	agree(t, s, 30*time.Second)
	time.Sleep(3 * time.Second) // what starts has settled
	still("while all restarted")
	hops.end()
	if history, _ := hops.history(t); len(history) != 1 {
		t.Errorf("once the routes were back, routers lost some again: %v", history)
	}
	after, broken := l.calm()
	if broken > 0 || !maps.Equal(before, after) {
		t.Errorf("%d flows broke: %v before, %v after: %q", broken, before, after, l.why)
	}
	awaitApplied(t, s, "d1")
}
