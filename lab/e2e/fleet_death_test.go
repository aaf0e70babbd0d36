package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/lab/stage"
	"github.com/ravel-lb/ravel/lab/traffic"
)

// everybody waits until each director sees all members alive and, where it probes, all real servers healthy.
func everybody(t *testing.T, s *stage.Stage, probes bool) {
	t.Helper()
	for _, d := range s.Directors() {
		eventually(t, 30*time.Second, func() error {
			var m membersOf
			if err := s.Ask(t.Context(), d, "members", &m); err != nil {
				return err
			}
			alive, healthy := 0, 0
			for _, member := range m.Members {
				if member.State == "alive" {
					alive++
				}
				for _, v := range member.Verdicts {
					if v.Dead == "" && v.Health == "healthy" {
						healthy++
					}
				}
			}
			all := len(s.Directors()) + len(s.Realservers())
			if alive != all || !m.Majority || probes && healthy != 2*len(s.Realservers()) || len(m.dead()) > 0 {
				return fmt.Errorf("%s sees %d of %d members alive, %d addresses healthy, dead are %v", d, alive, all, healthy, m.dead())
			}
			return nil
		})
	}
}

// nobodyDead fails the test if a director holds a real server for dead.
func nobodyDead(t *testing.T, s *stage.Stage, when string, directors ...string) {
	t.Helper()
	for _, d := range directors {
		var m membersOf
		must(t, s.Ask(within(t, 20*time.Second), d, "members", &m))
		if dead := m.dead(); len(dead) > 0 {
			t.Errorf("%s: %s holds for dead: %v", when, d, dead)
		}
	}
}

// weights counts the services in which a real server takes new flows by the kernel of a director.
func weights(s *stage.Stage, director, node string) (int, error) {
	table, err := readIPVS(s, director)
	n := 0
	for key, v := range table {
		if v.servers[nodeAddr(node, key.VIP)].weight > 0 {
			n++
		}
	}
	return n, err
}

// streamsAndRequests are UDP sockets that send for ever, and requests.
func streamsAndRequests(t *testing.T, s *stage.Stage) []*stage.Client {
	t.Helper()
	var clients []*stage.Client
	for _, node := range []string{"c1", "c2"} {
		var load traffic.Load
		for _, vip := range vips {
			to := netip.AddrPortFrom(vip, 80)
			load.Streams = append(load.Streams, traffic.Streams{Name: vip.String(), Target: to, Count: 10, Every: 200 * time.Millisecond})
			load.Requests = append(load.Requests, traffic.Requests{Name: vip.String(), Target: to, Rate: 6, Timeout: steadyPatience})
		}
		c, err := s.StartClient(within(t, 20*time.Second), node, "death", load)
		must(t, err)
		t.Cleanup(func() {
			if err := c.Stop(); err != nil {
				t.Error(err)
			}
		})
		clients = append(clients, c)
	}
	return clients
}

// podsOn sums up what is counted by pod on a node.
func podsOn(pods map[string]int, node string) (n int) {
	for pod, count := range pods {
		if strings.HasPrefix(pod, node+"-") {
			n += count
		}
	}
	return n
}

// smallFleet is a fleet of three directors and two real servers, r3 and r4: one CPU has not the time for the timings of
// seven members that are fast.
func smallFleet(t *testing.T, directorArgs, realserverArgs []string) *stage.Stage {
	t.Helper()
	s := fleetWith(t, nil, nil)
	nodes := append(s.Realservers(), s.Directors()...)
	for _, node := range nodes {
		must(t, s.Process(node).Signal(syscall.SIGTERM))
	}
	for _, node := range nodes {
		must(t, s.Process(node).Stop(within(t, 30*time.Second)))
	}
	s.DirectorArgs, s.RealserverArgs = directorArgs, realserverArgs
	must(t, s.Change(func(d *stage.Document) {
		d.Nodes = []string{"r3", "r4"}
		d.Endpoints = slices.DeleteFunc(d.Endpoints, func(e stage.Endpoint) bool { return !slices.Contains(d.Nodes, e.Node) })
	}))
	for _, node := range append(s.Realservers(), s.Directors()...) {
		must(t, s.Start(node))
	}
	must(t, s.WaitHops(within(t, time.Minute), stage.Routers(), vips, len(s.Directors())))
	return s
}

// The power of a real server's node fails: within the bound of the preset no director sends it a new flow, also where
// gossip alone decides, and UDP sockets that send for ever have another real server. Once it is back it takes flows again.
func TestARealserverNodeDies(t *testing.T) {
	for _, c := range []struct {
		node, preset, probe string
		bound               time.Duration
	}{
		{"r1", "lan", "tcp", 8 * time.Second},
		{"r2", "lan", "off", 8 * time.Second},
		{"r3", "fast", "tcp", 2 * time.Second},
		{"r4", "fast", "off", 2 * time.Second},
	} {
		t.Run(c.preset+", probes "+c.probe, func(t *testing.T) {
			// What is said in debugging costs a kernel of one CPU more than the timings of fast leave.
			common := []string{"--gossip-timing", c.preset, "--log-level", "info"}
			if c.preset == "lan" {
				common = nil
			}
			args := common
			if c.probe != "tcp" {
				args = append(slices.Clone(common), "--probe", c.probe)
			}
			var s *stage.Stage
			if c.preset == "lan" {
				s = fleetWith(t, args, common)
			} else {
				s = smallFleet(t, args, common)
			}
			ready(t, s)
			everybody(t, s, c.probe != "off")
			agree(t, s, 30*time.Second)
			clients := streamsAndRequests(t, s)
			eventually(t, 20*time.Second, func() error {
				r, err := stage.Report(t.Context(), clients...)
				if err != nil {
					return err
				}
				for _, q := range r.Streams {
					n := 0
					for _, on := range q.Pods {
						n += on
					}
					if n < q.Count || podsOn(q.Pods, c.node) == 0 {
						return fmt.Errorf("the streams to %s are answered by %v: none of %s", q.Name, q.Pods, c.node)
					}
				}
				return nil
			})
			watch := map[string]*poller{}
			for _, d := range s.Directors() {
				watch[d] = poll(t, 20*time.Millisecond, func() (string, error) {
					n, err := weights(s, d, c.node)
					return fmt.Sprint(n), err
				})
			}
			_, err := stage.Reset(within(t, 20*time.Second), clients...)
			must(t, err)

			for _, d := range s.Directors() {
				eventually(t, 20*time.Second, func() error {
					if n := watch[d].last(); n != "4" {
						return fmt.Errorf("%s sends %s new flows of %s services before its death", d, c.node, n)
					}
					return nil
				})
			}
			cut := time.Now()
			must(t, s.Fleet.CutLink(c.node, "eth1"))
			t.Cleanup(func() { must(t, s.Fleet.RestoreLink(c.node, "eth1")) })
			for _, d := range s.Directors() {
				eventually(t, 3*c.bound, func() error {
					if n := watch[d].last(); n != "0" {
						return fmt.Errorf("%s sends new flows of %s services to the dead %s", d, n, c.node)
					}
					return nil
				})
				watch[d].end()
				history, _ := watch[d].history(t)
				took := history[len(history)-1].at.Sub(cut)
				t.Logf("%s: no new flows after %s", d, took.Round(time.Millisecond))
				if took > c.bound || took < 0 {
					t.Errorf("%s sent new flows to a dead real server for %s, want %s at most", d, took, c.bound)
				}
			}
			time.Sleep(time.Second)
			r, err := stage.Reset(within(t, 20*time.Second), clients...)
			must(t, err)
			for _, q := range r.Streams {
				t.Logf("%s: no stream was longer than %s without an answer; %d moved", q.Name, q.LongestGap.Round(time.Millisecond), q.OtherPod)
				// What is sent just before the move is lost, and the next datagram comes 200 ms later.
				if n := podsOn(q.Pods, c.node); n > 0 || q.LongestGap > c.bound+300*time.Millisecond {
					t.Errorf("%s: %d streams are still on the dead %s, the longest gap was %s", q.Name, n, c.node, q.LongestGap)
				}
			}
			// What began after the move never meets the dead one.
			fresh := loadOn(t, s, "fresh", vips, 8)
			eventually(t, 20*time.Second, func() error {
				r, err = stage.Report(t.Context(), fresh...)
				for _, q := range r.Requests {
					if err == nil && q.Answered+q.Failures() < 20 {
						err = fmt.Errorf("%s: %d requests were answered", q.Name, q.Answered)
					}
				}
				return err
			})
			for _, q := range r.Requests {
				if n := podsOn(q.Pods, c.node); n > 0 || q.Failures() > 0 {
					t.Errorf("%s: after the move %d requests were answered, %d of them by the dead %s, failed %v: %q", q.Name, q.Answered, n, c.node, q.Failed, q.Examples)
				}
			}
			for _, client := range fresh {
				must(t, client.Stop())
			}

			must(t, s.Fleet.RestoreLink(c.node, "eth1"))
			back := time.Now()
			eventually(t, 40*time.Second, func() error {
				for _, d := range s.Directors() {
					if n, err := weights(s, d, c.node); err != nil || n != 4 {
						return fmt.Errorf("%s is back and %s sends it new flows of %d services: %w", c.node, d, n, err)
					}
				}
				r, err := stage.Report(t.Context(), clients...)
				if err != nil {
					return err
				}
				for _, q := range r.Requests {
					if podsOn(q.Pods, c.node) == 0 {
						return fmt.Errorf("%s: no request of %d was answered by %s", q.Name, q.Answered, c.node)
					}
				}
				return nil
			})
			t.Logf("%s took flows again after %s", c.node, time.Since(back).Round(100*time.Millisecond))
			for _, client := range clients {
				must(t, client.Stop())
			}
		})
	}
}

// Agents are not nodes: while one is not heard, and while all are dead or restart one after the other, no table changes
// and no request fails.
func TestAgentsComeAndGo(t *testing.T) {
	s := fleet(t)
	load := startSteady(t, s)
	everybody(t, s, true)
	agree(t, s, 30*time.Second)
	still := unchanged(t, s)

	quiet := time.Duration(number(t, "RAVEL_TEST_QUIET", 8)) * time.Second
	heal := deafen(t, s, "r2")
	eventually(t, 20*time.Second, func() error { return stateOf(t, s, "r2", "dead") })
	time.Sleep(quiet)
	nobodyDead(t, s, "gossip with r2 is blocked", s.Directors()...)
	load.unbroken(t, "while gossip with r2 is blocked")
	heal()

	must(t, s.Process("r1").Kill())
	eventually(t, 20*time.Second, func() error { return stateOf(t, s, "r1", "dead") })
	load.unbroken(t, "while one agent is dead")
	for _, r := range s.Realservers() {
		must(t, s.Process(r).Kill())
	}
	time.Sleep(quiet / 2)
	nobodyDead(t, s, "all agents are dead", s.Directors()...)
	load.unbroken(t, "while all agents are dead")
	for _, r := range s.Realservers() {
		must(t, s.Start(r))
	}
	everybody(t, s, true)
	for _, r := range s.Realservers() {
		must(t, s.Process(r).Stop(within(t, 30*time.Second)))
		must(t, s.Start(r))
		eventually(t, 30*time.Second, func() error { return s.Ready(t.Context(), r) })
	}
	everybody(t, s, true)
	load.unbroken(t, "during a rolling restart of the agents")
	still("while agents came and went")
	agree(t, s, 30*time.Second)
}

// stateOf checks that all directors see a member in a state.
func stateOf(t *testing.T, s *stage.Stage, node, state string) error {
	for _, d := range s.Directors() {
		var m membersOf
		if err := s.Ask(t.Context(), d, "members", &m); err != nil {
			return err
		}
		for _, member := range m.Members {
			if member.Name == node && member.State != state {
				return fmt.Errorf("%s sees %s %s, not %s", d, node, member.State, state)
			}
		}
	}
	return nil
}
