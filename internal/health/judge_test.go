package health

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ravel-lb/ravel"
)

// nodesOf returns r1 to rn, at 10.0.0.n and fd00::n.
func nodesOf(n int) []Node {
	var nodes []Node
	for i := range n {
		nodes = append(nodes, Node{
			Name: fmt.Sprintf("r%d", i+1),
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte((i + 1) >> 8), byte(i + 1)}),
				netip.AddrFrom16([16]byte{0: 0xfd, 14: byte((i + 1) >> 8), 15: byte(i + 1)})},
		})
	}
	return nodes
}

var letters = map[rune]ravel.Health{'h': ravel.Healthy, 'r': ravel.Refused, 's': ravel.Silent, '-': ravel.Unprobed}

// fleetOf reads members and, for each director, a letter for each node: "d1=hs d2=hs"; both families are alike.
func fleetOf(members, reports string) ravel.Fleet {
	f := ravel.Fleet{Settled: true, Members: membersOf(members), Reports: map[string]ravel.Report{}}
	for _, word := range strings.Fields(reports) {
		name, says, _ := strings.Cut(word, "=")
		health := map[netip.Addr]ravel.Health{}
		nodes := nodesOf(len(says))
		for i, letter := range says {
			for _, addr := range nodes[i].Addrs {
				if h := letters[letter]; h != ravel.Unprobed {
					health[addr] = h
				}
			}
		}
		f.Reports[name] = ravel.Report{Health: health}
	}
	return f
}

// dead says which nodes are dead, such as "r1 r3". Both addresses of a node are, or neither.
func deadOf(t *testing.T, v Verdict, nodes []Node) string {
	t.Helper()
	var names []string
	for _, n := range nodes {
		count := 0
		for _, addr := range n.Addrs {
			if reason, dead := v.Dead[addr]; dead {
				count++
				if reason == "" {
					t.Errorf("%s is dead without a reason", addr)
				}
			}
		}
		switch count {
		case len(n.Addrs):
			names = append(names, n.Name)
		case 0:
		default:
			t.Errorf("only some addresses of %s are dead: %v", n.Name, v.Dead)
		}
	}
	return strings.Join(names, " ")
}

type step struct {
	after   time.Duration
	members string
	reports string
	dead    string
}

// play runs the steps past the judge of d1, and holds each verdict to what Wake promises.
func play(t *testing.T, s Settings, nodes []Node, steps []step) (*Judge, Verdict) {
	t.Helper()
	j, now := NewJudge(nil, nil, s), start
	var v Verdict
	for i, st := range steps {
		fleet := fleetOf(st.members, st.reports)
		if i > 0 && st.members == "" {
			t.Fatalf("step %d: who is there?", i)
		}
		now = now.Add(st.after)
		v = j.Judge(now, "d1", fleet, nodes)
		if got := deadOf(t, v, nodes); got != st.dead {
			t.Errorf("step %d (%s; %s): dead %q, want %q; majority %v; %v", i, st.members, st.reports, got, st.dead, v.Majority, v.Problems)
		}
	}
	return j, v
}

const s = time.Second

func TestProbesDecide(t *testing.T) {
	for name, steps := range map[string][]step{
		"a majority of two": {
			{0, "d1 d2 d3 r1 r2", "d1=hh d2=hh d3=hh", ""},
			{s, "d1 d2 d3 r1 r2", "d1=hs d2=hh d3=hh", ""},
			{s, "d1 d2 d3 r1 r2", "d1=hs d2=hs d3=hh", "r2"},
			{s, "d1 d2 d3 r1 r2", "d1=hh d2=hs d3=hh", "r2"}, // held
			{s, "d1 d2 d3 r1 r2", "d1=hh d2=hh d3=hh", ""},
		},
		"ties are alive": {
			{0, "d1 d2 r1 r2", "d1=hh d2=hh", ""},
			{s, "d1 d2 r1 r2", "d1=hs d2=hh", ""},
			{s, "d1 d2 r1 r2", "d1=hs d2=hr", ""},
			{s, "d1 d2 r1 r2", "d1=hs d2=hs", "r2"},
		},
		"one of many that know nothing is not enough": {
			{0, "d1 d2 d3 r1 r2", "d1=hs", ""},
			{s, "d1 d2 d3 r1 r2", "d1=hs d2=h-", ""},
			{s, "d1 d2 d3 r1 r2", "d1=hs d2=hs", "r2"},
			{s, "d1 d2 d3 r1 r2", "d1=hs d2=h-", "r2"}, // but keeps it dead
		},
		"the only one is enough": {
			{0, "d1 r1 r2", "d1=hh", ""},
			{s, "d1 r1 r2", "d1=hs", "r2"},
		},
		"gossip says nothing of them": {
			{0, "d1 d2 r1 r2", "d1=hh d2=hh", ""},
			{s, "d1 d2 r1:dead r2:left", "d1=hh d2=hh", ""},
			{s, "d1 d2 r1:restarting r2:suspect", "d1=hh d2=hh", ""},
			{time.Hour, "d1 d2 r1:restarting r2:dead", "d1=hh d2=hh", ""},
		},
		"the directors that are gone have no say": {
			{0, "d1 d2 d3 r1 r2", "d1=hs d2=hh d3=hh", ""},
			{s, "d1 d2:suspect d3:dead r1 r2", "d1=hs d2=hh d3=hh", ""},
			{s, "d1 d2:dead d3:dead r1 r2", "d1=hs d2=hh d3=hh", "r2"},
		},
		"realservers have no say": {
			{0, "d1 d2 r1 r2", "d1=hs d2=hh r1=hs r2=hs", ""},
		},
		"an agent that is down is not a node that is down": {
			{0, "d1 d2 d3 r1 r2", "d1=hh d2=hh", ""},
			{s, "d1 d2 d3 r1:dead r2:dead", "d1=rr d2=rr", ""},
			{time.Hour, "d1 d2 d3 r1:dead r2:dead", "d1=rr d2=rr", ""},
			{s, "d1 d2 d3 r1:dead r2:dead", "d1=sr d2=sr", "r1"},
		},
		"a node that boots is dead until its agent answers": {
			{0, "d1 d2 r1 r2", "d1=hs d2=hs", "r2"},
			{s, "d1 d2 r1 r2", "d1=hr d2=hr", "r2"},
			{time.Hour, "d1 d2 r1 r2", "d1=hr d2=hr", "r2"},
			{s, "d1 d2 r1 r2", "d1=hr d2=hh", "r2"},
			{s, "d1 d2 r1 r2", "d1=hh d2=hh", ""},
		},
		"nobody knows": {
			{0, "d1 d2 r1 r2", "d1=-- d2=--", ""},
			{s, "d1 d2 r1 r2", "d1=-s d2=-s", "r2"},
			{s, "d1 d2 r1 r2", "", "r2"},
			{s, "d1 d2 r1 r2", "d1=hh d2=hh", "r2"},
			{s, "d1 d2 r1 r2", "d1=hh d2=hh", ""},
		},
		// The table of two directors in docs/health.md.
		"two: the other dies, with witnesses": {
			{0, "d1 d2 r1 r2", "d1=hh d2=hh", ""},
			{s, "d1 d2:dead r1 r2", "d1=hh d2=hh", ""},
			{s, "d1 d2:dead r1 r2", "d1=hs d2=hh", "r2"},
		},
		"two: the other dies, without witnesses": {
			{0, "d1 d2", "d1=hh d2=hh", ""},
			{s, "d1 d2", "d1=sh d2=sh", "r1"},
			{s, "d1 d2:dead", "d1=sh d2=sh", "r1"}, // the majority said so
			{s, "d1 d2:dead", "d1=ss d2=hh", "r1"}, // and nobody else
			{s, "d1 d2:dead", "d1=hs d2=hh", "r1"},
			{s, "d1 d2:dead", "d1=hs d2=hh", ""},
			{time.Hour, "d1 d2:dead", "d1=ss d2=hh", ""},
		},
		"two: the other says goodbye": {
			{0, "d1 d2", "d1=hh d2=hh", ""},
			{s, "d1 d2:left", "d1=hs d2=hh", "r2"},
		},
		"two: the other restarts": {
			{0, "d1 d2", "d1=hh d2=hh", ""},
			{s, "d1 d2:restarting", "d1=hs d2=hh", "r2"},
			{s, "d1 d2", "d1=ss", "r2"}, // back, and knows nothing yet
			{s, "d1 d2", "d1=ss d2=ss", "r1 r2"},
		},
		"cut off from gossip and not from the nodes": {
			{0, "d1 d2 d3 r1 r2", "d1=hh d2=hh d3=hh", ""},
			{s, "d1 d2:suspect d3:suspect r1:suspect r2:suspect", "d1=hh d2=hh d3=hh", ""},
			{s, "d1 d2:dead d3:dead r1:dead r2:dead", "d1=hh d2=hh d3=hh", ""},
			{time.Hour, "d1 d2:dead d3:dead r1:dead r2:dead", "d1=hs d2=hh d3=hh", ""}, // also if one dies now
			{time.Hour, "d1 d2 d3 r1 r2:dead", "d1=hs d2=hs d3=hs", "r2"},
		},
		"cut off from all": {
			{0, "d1 d2 d3 r1 r2 r3 r4", "d1=hhhh d2=hhhh d3=hhhh", ""},
			{s, "d1 d2:suspect d3 r1 r2 r3 r4", "d1=hhhh d2=hhhh d3=hhhh", ""},
			{s, "d1 d2:suspect d3:suspect r1:suspect r2:suspect r3 r4", "d1=ssss d2=hhhh d3=hhhh", ""},
			{s, "d1 d2:dead d3:dead r1:suspect r2:suspect r3 r4", "d1=ssss d2=hhhh d3=hhhh", ""},
			{s, "d1 d2:dead d3:dead r1:dead r2:dead r3:dead r4:suspect", "d1=ssss d2=hhhh d3=hhhh", ""},
			{s, "d1 d2:dead d3:dead r1:dead r2:dead r3:dead r4:dead", "d1=ssss d2=hhhh d3=hhhh", ""},
		},
		"a witness too few": {
			{0, "d1 r1", "d1=h", ""},
			{s, "d1 r1:dead", "d1=s", ""},
		},
	} {
		t.Run(name, func(t *testing.T) {
			play(t, Settings{Probes: true}, nodesOf(len(strings.TrimPrefix(strings.Fields(steps[len(steps)-1].reports)[0], "d1="))), steps)
		})
	}
}

func TestGossipDecides(t *testing.T) {
	for name, steps := range map[string][]step{
		"dead, and back": {
			{0, "d1 d2 r1 r2", "", ""},
			{s, "d1 d2 r1 r2:suspect", "", ""},
			{s, "d1 d2 r1 r2:dead", "", "r2"},
			{s, "d1 d2 r1 r2:suspect", "", "r2"},
			{s, "d1 d2 r1 r2", "", "r2"}, // held
			{s, "d1 d2 r1 r2", "", ""},
		},
		"what probes say is nothing": {
			{0, "d1 d2 r1 r2", "d1=ss d2=ss", ""},
			{s, "d1 d2 r1 r2:dead", "d1=sh d2=sh", "r2"},
		},
		"gone for good": {
			{0, "d1 d2 r1 r2", "", ""},
			{s, "d1 d2 r1 r2:left", "", "r2"},
		},
		"restarts": {
			{0, "d1 d2 r1 r2", "", ""},
			{s, "d1 d2 r1:restarting r2:restarting", "", ""},
			{59 * s, "d1 d2 r1 r2:restarting", "", ""},
			{s, "d1 d2 r1 r2:restarting", "", "r2"},
			{s, "d1 d2 r1 r2", "", "r2"},
			{s, "d1 d2 r1 r2", "", ""},
			{s, "d1 d2 r1 r2:restarting", "", ""}, // a new grace
			{59 * s, "d1 d2 r1 r2:restarting", "", ""},
			{s, "d1 d2 r1 r2:restarting", "", "r2"},
		},
		"gossip forgets": {
			{0, "d1 d2 r1 r2", "", ""},
			{s, "d1 d2 r1 r2:dead", "", "r2"},
			{time.Hour, "d1 d2 r1", "", "r2"},
		},
		"no agent, or an old one": {
			{0, "d1 d2", "", ""},
			{time.Hour, "d1 d2", "d1=ss d2=ss", ""},
		},
		"cut off": {
			{0, "d1 d2 d3 r1 r2", "", ""},
			{s, "d1 d2:suspect d3:suspect r1:suspect r2:suspect", "", ""},
			{s, "d1 d2:suspect d3:suspect r1:dead r2:suspect", "", ""},
			{s, "d1 d2:suspect d3:dead r1:dead r2:suspect", "", ""},
			{s, "d1 d2:dead d3:dead r1:dead r2:dead", "", ""},
			{time.Hour, "d1 d2:dead d3:dead r1:dead r2:dead", "", ""},
			{s, "d1 d2 d3 r1 r2", "", ""},
		},
		"cut off with one dead before": {
			{0, "d1 d2 d3 r1 r2", "", ""},
			{s, "d1 d2 d3 r1 r2:dead", "", "r2"},
			{s, "d1 d2:dead d3:dead r1:dead r2:dead", "", "r2"},
			{s, "d1 d2 d3 r1 r2", "", "r2"},
			{s, "d1 d2 d3 r1 r2", "", ""},
		},
		"the survivor of two without witnesses": {
			{0, "d1 d2", "", ""},
			{s, "d1 d2:dead", "", ""},
			{s, "d1 d2:dead r1:dead r2:dead", "", ""}, // whom it never saw: no majority
		},
		"the survivor of two with witnesses": {
			{0, "d1 d2 r1 r2", "", ""},
			{s, "d1 d2:dead r1 r2", "", ""},
			{s, "d1 d2:dead r1 r2:dead", "", ""}, // 2 of 4
			{time.Hour, "d1 d2:dead r1 r2", "", ""},
			{time.Hour, "d1 d2:dead r1 r2", "", ""}, // d2 is forgotten: 3 of 3
			{s, "d1 d2:dead r1 r2:dead", "", "r2"},
		},
	} {
		t.Run(name, func(t *testing.T) { play(t, Settings{}, nodesOf(2), steps) })
	}
}

// A process that is cut off asks one member after another, and judges nobody at any moment of it, however large the
// fleet is and wherever its turn begins.
func TestCutOffInALargeFleetJudgesNobody(t *testing.T) {
	for _, n := range []int{3, 4, 5, 7, 12, 40, 5 + runs(50)} {
		for _, suspicion := range []int{3, 8, 48} { // turns until a suspect is dead
			members := []ravel.Member{{Name: "a-self"}}
			for i := range n - 1 {
				members = append(members, ravel.Member{Name: fmt.Sprintf("r%d", 10000+i), Role: ravel.Realserver})
			}
			var nodes []Node
			for i, m := range members[1:] {
				nodes = append(nodes, Node{m.Name, []netip.Addr{address(2 * i)}})
			}
			j := NewJudge(nil, nil, Settings{})
			j.Judge(start, "a-self", ravel.Fleet{Settled: true, Members: members}, nodes)
			for turn := range n + suspicion {
				members = slices.Clone(members)
				if i := 1 + turn; i < n {
					members[i].State = ravel.Suspect
				}
				if i := 1 + turn - suspicion; i > 0 && i < n {
					members[i].State = ravel.Dead
				}
				v := j.Judge(start.Add(time.Duration(turn)*s), "a-self", ravel.Fleet{Settled: true, Members: members}, nodes)
				if len(v.Dead) > 0 {
					t.Fatalf("%d members, %d turns of suspicion: at turn %d dead are %v", n, suspicion, turn, v.Dead)
				}
			}
		}
	}
}

func TestUnsettledJudgesNobody(t *testing.T) {
	j, nodes := NewJudge(nil, nil, Settings{Probes: true}), nodesOf(1)
	fleet := fleetOf("d1 d2", "d1=s d2=s")
	fleet.Settled = false
	if v := j.Judge(start, "d1", fleet, nodes); len(v.Dead) > 0 || v.Majority {
		t.Errorf("unsettled: %v", v)
	}
	fleet.Settled = true
	if v := j.Judge(start, "d1", fleet, nodes); len(v.Dead) != 2 || !v.Majority {
		t.Errorf("settled: %v", v)
	}
}

// A director may have a node's name: that it is gone says nothing of the node.
func TestADirectorIsNoAgent(t *testing.T) {
	nodes := []Node{{"d2", nodesOf(1)[0].Addrs}}
	v := NewJudge(nil, nil, Settings{}).Judge(start, "d1", fleetOf("d1 d2:dead d3", ""), nodes)
	if len(v.Dead) > 0 {
		t.Errorf("dead: %v", v.Dead)
	}
}

func TestSelfIsAMemberAnyway(t *testing.T) {
	nodes := nodesOf(1)
	for _, members := range []string{"", "r1", "d1:dead r1", "d1:suspect r1", "d1:left r1"} {
		v := NewJudge(nil, nil, Settings{Probes: true}).Judge(start, "d1", fleetOf(members, "d1=s"), nodes)
		if len(v.Dead) != 2 || !v.Majority {
			t.Errorf("%q: %+v", members, v)
		}
	}
}

func TestHoldDoubles(t *testing.T) {
	for n, want := range []time.Duration{1: s, 2: 2 * s, 3: 4 * s, 4: 8 * s, 5: 16 * s, 6: 32 * s, 7: time.Minute, 8: time.Minute, 1000: time.Minute} {
		if n == 0 || want == 0 {
			continue
		}
		if got := hold(n); got != want {
			t.Errorf("after death %d: %s, want %s", n, got, want)
		}
	}

	reg := prometheus.NewRegistry()
	j, nodes, now := NewJudge(nil, reg, Settings{Probes: true}), nodesOf(2), start
	well, ill := fleetOf("d1 r1 r2", "d1=hh"), fleetOf("d1 r1 r2", "d1=hs")
	cycle := func() time.Duration {
		t.Helper()
		v := j.Judge(now, "d1", ill, nodes)
		if deadOf(t, v, nodes) != "r2" {
			t.Fatalf("not dead: %+v", v)
		}
		now = now.Add(s)
		back := now
		for {
			v = j.Judge(now, "d1", well, nodes)
			if deadOf(t, v, nodes) == "" {
				return now.Sub(back)
			}
			if v.Wake.IsZero() {
				t.Fatal("held for ever")
			}
			now = v.Wake
		}
	}
	var held []time.Duration
	for range 9 {
		held = append(held, cycle())
		now = now.Add(5 * time.Minute)
	}
	now = now.Add(calmAfter)
	held = append(held, cycle(), cycle())
	want := []time.Duration{s, 2 * s, 4 * s, 8 * s, 16 * s, 32 * s, time.Minute, time.Minute, time.Minute, s, 2 * s}
	if diff := cmp.Diff(want, held); diff != "" {
		t.Errorf("held (-want +got):\n%s", diff)
	}
	if deaths, flaps := testutil.ToFloat64(j.metrics.deaths), testutil.ToFloat64(j.metrics.flaps); deaths != 22 || flaps != 18 {
		t.Errorf("%g deaths, %g flaps; want 22 and 18 of two addresses", deaths, flaps)
	}

	// What fails again while it is held has died again.
	j.Judge(now, "d1", ill, nodes)
	j.Judge(now.Add(s), "d1", well, nodes)
	j.Judge(now.Add(3*s), "d1", ill, nodes)
	if v := j.Judge(now.Add(20*s), "d1", well, nodes); v.Wake != now.Add(28*s) || deadOf(t, v, nodes) != "r2" {
		t.Errorf("wakes %s after, dead %v", v.Wake.Sub(now), v.Dead)
	}
	if got := testutil.ToFloat64(j.metrics.addrs.WithLabelValues("held")); got != 2 {
		t.Errorf("%g addresses are held by the metric, want 2", got)
	}
}

func TestAlone(t *testing.T) {
	both := Families{V4: true, V6: true}
	type look struct {
		members, reports string
		want             Families
		dead             string
	}
	for name, looks := range map[string][]look{
		"more than half": {
			{"d1 d2 d3 r1 r2 r3 r4", "d1=sshh d2=hhhh d3=hhhh", Families{}, ""},
			{"d1 d2 d3 r1 r2 r3 r4", "d1=sssh d2=hhhh d3=hhhh", both, ""},
			{"d1 d2 d3 r1 r2 r3 r4", "d1=sssh d2=hrrh d3=rhhh", both, ""}, // refused is reached
			{"d1 d2 d3 r1 r2 r3 r4", "d1=sssh d2=hh-h d3=hhhh", both, ""},
			{"d1 d2 d3 r1 r2 r3 r4", "d1=sshh d2=hhhh d3=hhhh", Families{}, ""},
		},
		"the others do not reach them either": {
			{"d1 d2 d3 r1 r2 r3 r4", "d1=ssss d2=sssh d3=sssh", Families{}, "r1 r2 r3"},
			{"d1 d2 d3 r1 r2 r3 r4", "d1=ssss d2=hhhs d3=ssss", Families{}, "r1 r2 r3 r4"},
		},
		"the others know nothing": {
			{"d1 d2 d3 r1 r2 r3 r4", "d1=ssss", Families{}, ""},
		},
		"two directors": {
			{"d1 d2 r1 r2 r3 r4", "d1=ssss d2=hhhh", both, ""},
			{"d1 d2 r1 r2 r3 r4", "d1=ssss d2=shhh", both, "r1"},       // d2's word is the only one of worth
			{"d1 d2 r1 r2 r3 r4", "d1=sshh d2=hhss", Families{}, "r1"}, // held
		},
		"it stays so when it loses sight of the others": {
			{"d1 d2 d3 r1 r2 r3 r4", "d1=ssss d2=hhhh d3=hhhh", both, ""},
			{"d1 d2:suspect d3:suspect r1:suspect r2 r3 r4", "d1=ssss d2=hhhh d3=hhhh", both, ""},
			{"d1 d2:dead d3:dead r1:suspect r2:suspect r3:suspect r4", "d1=ssss d2=hhhh d3=hhhh", both, ""},
			{"d1 d2:dead d3:dead r1:dead r2:dead r3:dead r4:dead", "d1=ssss d2=hhhh d3=hhhh", both, ""},
			{"d1 d2:dead d3:dead r1:dead r2:dead r3:dead r4:dead", "d1=sshh d2=hhhh d3=hhhh", Families{}, ""},
		},
		"until it is sure that they are gone": {
			{"d1 d2 r1 r2 r3 r4", "d1=sssh d2=hhhh", both, ""},
			{"d1 d2:left r1 r2 r3 r4", "d1=sssh d2=hhhh", Families{}, "r1 r2 r3"},
		},
		"the word of who is alone is worth nothing": {
			{"d1 d2 d3 r1 r2 r3 r4", "d1=hhhh d2=ssss d3=hhhh", Families{}, ""},
			{"d1 d2 d3 r1 r2 r3 r4", "d1=hhhs d2=ssss d3=hhhs", Families{}, "r4"},
			{"d1 d2 d3 r1 r2 r3 r4", "d1=hhhs d2=ssss d3=hhhh", Families{}, "r4"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			j, nodes := NewJudge(nil, nil, Settings{Probes: true}), nodesOf(4)
			for i, l := range looks {
				v := j.Judge(start, "d1", fleetOf(l.members, l.reports), nodes)
				if got := deadOf(t, v, nodes); v.Alone != l.want || got != l.dead {
					t.Errorf("look %d: alone %+v, want %+v; dead %q, want %q", i, v.Alone, l.want, got, l.dead)
				}
				told := strings.Contains(fmt.Sprint(v.Problems), "which others reach")
				if told != (l.want != Families{}) {
					t.Errorf("look %d: problems %v", i, v.Problems)
				}
			}
		})
	}
}

func TestAloneIsByFamily(t *testing.T) {
	nodes := nodesOf(4)
	fleet := fleetOf("d1 d2 r1 r2 r3 r4", "d1=hhhh d2=hhhh")
	for _, n := range nodes {
		fleet.Reports["d1"].Health[n.Addrs[1]] = ravel.Silent
	}
	v := NewJudge(nil, nil, Settings{Probes: true}).Judge(start, "d1", fleet, nodes)
	if v.Alone != (Families{V6: true}) || !v.Alone.Of(nodes[0].Addrs[1]) || v.Alone.Of(nodes[0].Addrs[0]) {
		t.Errorf("alone %+v", v.Alone)
	}
}

// Whatever the directors say, not all of them find themselves alone.
func TestNeverAllAreAlone(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	most := 0
	for range runs(1000) {
		directors, nodes := 1+rnd.IntN(6), nodesOf(1+rnd.IntN(6))
		reports := make([]map[netip.Addr]ravel.Health, directors)
		for d := range reports {
			reports[d] = map[netip.Addr]ravel.Health{}
			for _, n := range nodes {
				reports[d][n.Addrs[0]] = ravel.Health(rnd.IntN(4))
			}
		}
		p, alone := take(reports, nodes), 0
		for d := range directors {
			if p.alone(d, v4) {
				alone++
			}
		}
		if alone == directors {
			t.Fatalf("all of %d: %v", directors, reports)
		}
		most = max(most, alone)
	}
	if most == 0 {
		t.Error("nobody ever was alone: the test shows nothing")
	}
}

func TestHurry(t *testing.T) {
	nodes := nodesOf(4)
	for _, c := range []struct{ members, reports, want string }{
		{"d1 d2 d3 r1 r2 r3 r4", "d1=hhhh d2=hhhh d3=hhhh", ""},
		{"d1 d2 d3 r1:suspect r2:dead r3:restarting r4:left", "d1=hhhh d2=hhhh d3=hhhh", "r1 r2"},
		{"d1 d2 d3 r1:suspect r2 r3 r4", "d1=shhh d2=hhhh d3=hhhh", ""},        // it knows
		{"d1 d2 d3 r1 r2 r3 r4", "d1=hhhh d2=shhh d3=hhhh", "r1"},              // another says so
		{"d1 d2:dead d3 r1 r2 r3 r4", "d1=hhhh d2=shhh d3=hhhh", ""},           // who is gone
		{"d1 d2 d3 r1 r2 r3 r4", "d1=---- d2=shhh d3=hhhh", "r1"},              //
		{"d1 d2 d3 r1 r2 r3 r4", "d1=hhhh d2=ssss d3=hhhh", ""},                // who is alone
		{"d1 d2 d3 r1:suspect r2:suspect", "d1=--rr d2=hhhh d3=hhhh", "r1 r2"}, //
	} {
		v := NewJudge(nil, nil, Settings{Probes: true}).Judge(start, "d1", fleetOf(c.members, c.reports), nodes)
		var got []string
		for _, n := range nodes {
			if slices.Contains(v.Hurry, n.Addrs[0]) && slices.Contains(v.Hurry, n.Addrs[1]) {
				got = append(got, n.Name)
			}
		}
		if strings.Join(got, " ") != c.want || !slices.IsSortedFunc(v.Hurry, netip.Addr.Compare) {
			t.Errorf("%s; %s: hurry %v, want %s", c.members, c.reports, v.Hurry, c.want)
		}
		if v := NewJudge(nil, nil, Settings{}).Judge(start, "d1", fleetOf(c.members, c.reports), nodes); len(v.Hurry) > 0 {
			t.Errorf("without probes: hurry %v", v.Hurry)
		}
	}
}

func TestProblems(t *testing.T) {
	one := []Node{{"r1", []netip.Addr{netip.MustParseAddr("10.0.0.1")}}}
	for name, c := range map[string]struct {
		settings         Settings
		members, reports string
		soon, later      string // at once, and after a minute
	}{
		"nothing": {Settings{Probes: true}, "d1 d2 r1", "d1=h d2=h", "[]", "[]"},
		"the agent is down": {Settings{Probes: true}, "d1 d2 r1:dead", "d1=r d2=r", "[]",
			"[node r1 (10.0.0.1): its kernel answers and its agent does not, so its redirects stand as they were (start ravel realserver there)]"},
		"refused to one of two": {Settings{Probes: true}, "d1 d2 r1", "d1=h d2=r", "[]",
			"[node r1 (10.0.0.1): its kernel answers and its agent does not, so its redirects stand as they were (start ravel realserver there)]"},
		"refused to one of three": {Settings{Probes: true}, "d1 d2 d3 r1", "d1=h d2=r d3=h", "[]", "[]"},
		"gossip is blocked": {Settings{Probes: true}, "d1 d2 r1:dead", "d1=h d2=h", "[]",
			"[node r1 (10.0.0.1): its agent answers probes and is dead to gossip (check that its gossip port is open, TCP and UDP)]"},
		"a path of its own": {Settings{Probes: true}, "d1 d2 d3 r1 r2 r3", "d1=shh d2=hhh d3=hhh", "[]",
			"[node r1 (10.0.0.1): does not answer this director's probes, and is not dead to the fleet (check the path to it)]"},
		"no majority": {Settings{FleetSize: 3}, "d1 r1:dead", "",
			"[fleet: 1 of 3 voting members are seen, no majority: nobody becomes dead (if the others are gone for good: set fleet-size, or restart this director)]",
			"[fleet: 1 of 3 voting members are seen, no majority: nobody becomes dead (if the others are gone for good: set fleet-size, or restart this director)]"},
		"too small a fleet": {Settings{FleetSize: 2}, "d1 d2 r1", "",
			"[fleet: 3 voting members are seen and fleet-size is 2: a majority of it means nothing (set fleet-size to the number of directors and realservers, or to 0)]",
			"[fleet: 3 voting members are seen and fleet-size is 2: a majority of it means nothing (set fleet-size to the number of directors and realservers, or to 0)]"},
		"suspects": {Settings{}, "d1 d2 r1:suspect r2:suspect r3:suspect r4 r5 r6", "",
			"[fleet: many members are suspected: nobody becomes dead until that is settled]",
			"[fleet: many members are suspected: nobody becomes dead until that is settled]"},
	} {
		t.Run(name, func(t *testing.T) {
			nodes := one
			if strings.Contains(c.reports, "shh") {
				nodes = append(slices.Clone(one), Node{"r2", []netip.Addr{netip.MustParseAddr("10.0.0.2")}}, Node{"r3", []netip.Addr{netip.MustParseAddr("10.0.0.3")}})
			}
			j := NewJudge(nil, nil, c.settings)
			fleet := fleetOf(c.members, c.reports)
			v := j.Judge(start, "d1", fleet, nodes)
			if got := fmt.Sprint(v.Problems); got != c.soon {
				t.Errorf("at once\n%s, want\n%s", got, c.soon)
			}
			if c.soon != c.later && v.Wake != start.Add(time.Minute) {
				t.Errorf("wakes after %s", v.Wake.Sub(start))
			}
			if got := fmt.Sprint(j.Judge(start.Add(time.Minute), "d1", fleet, nodes).Problems); got != c.later {
				t.Errorf("after a minute\n%s, want\n%s", got, c.later)
			}
		})
	}
}

// runs is how many random histories are walked; RAVEL_LONG walks twenty times as many.
func runs(n int) int {
	if os.Getenv("RAVEL_LONG") != "" {
		return 20 * n
	}
	return n
}

// history makes random fleets, each a small change of the one before.
type history struct {
	rnd     *rand.Rand
	nodes   []Node
	members []ravel.Member
	reports map[string]map[netip.Addr]ravel.Health
}

func newHistory(rnd *rand.Rand) *history {
	h := &history{rnd: rnd, nodes: nodesOf(1 + rnd.IntN(6)), reports: map[string]map[netip.Addr]ravel.Health{}}
	for i := range 1 + rnd.IntN(4) {
		name := "d" + strconv.Itoa(i+1)
		h.members = append(h.members, ravel.Member{Name: name})
		h.reports[name] = map[netip.Addr]ravel.Health{}
	}
	for _, n := range h.nodes {
		if rnd.IntN(5) > 0 {
			h.members = append(h.members, ravel.Member{Name: n.Name, Role: ravel.Realserver})
		}
	}
	return h
}

func (h *history) next() ravel.Fleet {
	if h.rnd.IntN(12) == 0 { // d1 reaches nobody
		for name, report := range h.reports {
			for addr := range addressesOf(h.nodes) {
				report[addr] = ravel.Healthy
				if name == "d1" {
					report[addr] = ravel.Silent
				}
			}
		}
	}
	for range 1 + h.rnd.IntN(4) {
		if h.rnd.IntN(3) == 0 {
			h.members[h.rnd.IntN(len(h.members))].State = ravel.MemberState(h.rnd.IntN(5) * h.rnd.IntN(2))
			h.members[0].State = ravel.Alive // who judges
			continue
		}
		n := h.nodes[h.rnd.IntN(len(h.nodes))]
		says := ravel.Health(h.rnd.IntN(4))
		for _, name := range slices.Sorted(maps.Keys(h.reports)) { // in order, so that a seed means one history
			report := h.reports[name]
			if h.rnd.IntN(4) == 0 {
				says = ravel.Health(h.rnd.IntN(4))
			}
			for _, addr := range n.Addrs {
				report[addr] = says
			}
		}
	}
	f := ravel.Fleet{Settled: true, Members: slices.Clone(h.members), Reports: map[string]ravel.Report{}}
	for name, report := range h.reports {
		f.Reports[name] = ravel.Report{Health: maps.Clone(report)}
	}
	return f
}

// fork returns a judge that knows what j does.
func fork(j *Judge) *Judge {
	k := &Judge{
		log: j.log, settings: j.settings, metrics: j.metrics,
		electorate: j.electorate, alone: j.alone, nodes: maps.Clone(j.nodes), addrs: map[netip.Addr]*record{},
	}
	for addr, r := range j.addrs {
		again := *r
		k.addrs[addr] = &again
	}
	return k
}

// Through random histories: who becomes dead was silent to a strict majority, or dead to gossip, under a majority; order
// of the input does not matter; nothing changes before Wake; who is well for a minute is alive.
func TestRandomHistories(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	deaths, returns, alone := 0, 0, 0
	for run := range uint64(runs(40)) {
		rnd := rand.New(rand.NewPCG(seed, run))
		h, now := newHistory(rnd), start
		settings := Settings{Probes: rnd.IntN(3) > 0, FleetSize: rnd.IntN(2) * rnd.IntN(8)}
		j := NewJudge(nil, nil, settings)
		var was Verdict
		for range 60 {
			fleet := h.next()
			now = now.Add(time.Duration(rnd.Int64N(int64(20 * s))))
			if rnd.IntN(20) == 0 {
				now = now.Add(time.Hour)
			}
			shuffled := slices.Clone(h.nodes)
			rnd.Shuffle(len(shuffled), func(a, b int) { shuffled[a], shuffled[b] = shuffled[b], shuffled[a] })
			other := fork(j).Judge(now, "d1", fleet, shuffled)
			v := j.Judge(now, "d1", fleet, h.nodes)
			if !reflect.DeepEqual(v, other) {
				t.Fatalf("run %d: another order of the nodes:\n%s", run, cmp.Diff(v, other, sameAddr))
			}
			if v.Alone != (Families{}) {
				alone++
			}
			for addr := range v.Dead {
				if _, before := was.Dead[addr]; before {
					continue
				}
				deaths++
				if !v.Majority {
					t.Fatalf("run %d: %s died without a majority", run, addr)
				}
				if settings.Probes {
					silent, known := 0, 0
					for _, d := range fleet.Live(ravel.Director) {
						switch fleet.Reports[d.Name].Health[addr] {
						case ravel.Silent:
							silent++
							known++
						case ravel.Healthy, ravel.Refused:
							known++
						}
					}
					if v.Alone == (Families{}) && silent == 0 {
						t.Fatalf("run %d: %s died and nobody calls it silent", run, addr)
					}
					if silent == 1 && known > 1 && len(fleet.Live(ravel.Director)) == known && j.poll(fleet, h.nodes) == known {
						t.Fatalf("run %d: %s died by one of %d", run, addr, known)
					}
				} else {
					for _, n := range h.nodes {
						m, _ := fleet.Member(n.Name)
						if slices.Contains(n.Addrs, addr) && (m.State == ravel.Alive || m.State == ravel.Suspect) {
							t.Fatalf("run %d: %s died and its agent is %s", run, addr, m.State)
						}
					}
				}
			}
			for addr := range was.Dead {
				if _, still := v.Dead[addr]; !still {
					returns++
				}
			}
			was = v

			// Nothing changes before Wake.
			at := now.Add(time.Duration(rnd.Int64N(int64(3 * time.Hour))))
			if !v.Wake.IsZero() {
				if !v.Wake.After(now) {
					t.Fatalf("run %d: wakes at once", run)
				}
				at = now.Add(time.Duration(rnd.Int64N(int64(v.Wake.Sub(now)))))
			}
			if later := fork(j).Judge(at, "d1", fleet, h.nodes); !reflect.DeepEqual(v, later) {
				t.Fatalf("run %d: %s later, before %s:\n%s", run, at.Sub(now), v.Wake.Sub(now), cmp.Diff(v, later, sameAddr))
			}
		}

		// All is well for a minute: nobody is dead.
		for i := range h.members {
			h.members[i].State = ravel.Alive
		}
		fleet := h.next()
		fleet.Members = slices.Clone(h.members)
		for i := range fleet.Members {
			fleet.Members[i].State = ravel.Alive
		}
		for _, n := range h.nodes {
			for _, addr := range n.Addrs {
				for _, report := range fleet.Reports {
					report.Health[addr] = ravel.Healthy
				}
			}
		}
		j.Judge(now, "d1", fleet, h.nodes)
		if v := j.Judge(now.Add(maxHold), "d1", fleet, h.nodes); len(v.Dead) > 0 || v.Alone != (Families{}) {
			t.Fatalf("run %d: all is well and dead are %v, alone %v", run, v.Dead, v.Alone)
		}
	}
	if deaths < 100 || returns < 100 || alone == 0 {
		t.Errorf("%d deaths, %d returns, %d times alone: the walk shows little", deaths, returns, alone)
	}
	t.Logf("%d deaths, %d returns, %d times alone", deaths, returns, alone)
}

// poll returns how many live directors are not alone in either family.
func (j *Judge) poll(fleet ravel.Fleet, nodes []Node) int {
	var reports []map[netip.Addr]ravel.Health
	for _, d := range fleet.Live(ravel.Director) {
		reports = append(reports, fleet.Reports[d.Name].Health)
	}
	p, count := take(reports, nodes), 0
	for d := range reports {
		if !p.alone(d, v4) && !p.alone(d, v6) {
			count++
		}
	}
	return count
}

// Directors that know the same come to the same verdict, wherever each is in it, once what is held has run out.
func TestDirectorsAgree(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for run := range uint64(runs(20)) {
		rnd := rand.New(rand.NewPCG(seed, run))
		h, now := newHistory(rnd), start
		// Realservers and directors are there all the time; what they find changes.
		names := slices.Sorted(maps.Keys(h.reports))
		judges := map[string]*Judge{}
		for _, name := range names {
			judges[name] = NewJudge(nil, nil, Settings{Probes: true})
		}
		for range 30 {
			fleet := h.next()
			fleet.Members = slices.Clone(h.members)
			for i := range fleet.Members {
				fleet.Members[i].State = ravel.Alive
			}
			now = now.Add(2 * s)
			// They hear of it at different times.
			for _, name := range names {
				judges[name].Judge(now.Add(time.Duration(rnd.Int64N(int64(s)))), name, fleet, h.nodes)
			}
			var agreed map[netip.Addr]string
			for i, name := range names {
				v := fork(judges[name]).Judge(now.Add(s+maxHold), name, fleet, h.nodes)
				if i > 0 && !maps.Equal(v.Dead, agreed) {
					t.Fatalf("run %d: %s and %s differ:\n%s", run, names[0], name, cmp.Diff(agreed, v.Dead, sameAddr))
				}
				agreed = v.Dead
			}
			// One that starts now knows no past: it differs only where that counts.
			fresh := NewJudge(nil, nil, Settings{Probes: true}).Judge(now.Add(s+maxHold), "d1", fleet, h.nodes)
			for _, addr := range plain(fleet, h.nodes) {
				_, mine := fresh.Dead[addr]
				if _, theirs := agreed[addr]; mine != theirs {
					t.Fatalf("run %d: who starts now says of %s %v, the others %v", run, addr, mine, theirs)
				}
			}
		}
	}
}

// plain returns the addresses that are silent to two directors of worth or more and to no other that knows, or healthy
// to all that know.
func plain(fleet ravel.Fleet, nodes []Node) []netip.Addr {
	var reports []map[netip.Addr]ravel.Health
	for _, d := range fleet.Live(ravel.Director) {
		reports = append(reports, fleet.Reports[d.Name].Health)
	}
	p := take(reports, nodes)
	p.count([2]bool{})
	var addrs []netip.Addr
	for _, addr := range p.addrs {
		v, _ := p.of(addr)
		if v.silent > 1 && v.opinions() == v.silent || v.healthy > 0 && v.opinions() == v.healthy {
			addrs = append(addrs, addr)
		}
	}
	return addrs
}

func addressesOf(nodes []Node) map[netip.Addr]bool {
	all := map[netip.Addr]bool{}
	for _, n := range nodes {
		for _, addr := range n.Addrs {
			all[addr] = true
		}
	}
	return all
}

var sameAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func BenchmarkJudge(b *testing.B) {
	nodes := nodesOf(500)
	var members []string
	var reports []string
	for d := range 10 {
		members = append(members, fmt.Sprintf("d%d", d))
		reports = append(reports, fmt.Sprintf("d%d=%s", d, strings.Repeat("h", 490)+strings.Repeat("s", 10)))
	}
	for _, n := range nodes {
		members = append(members, n.Name)
	}
	fleet := fleetOf(strings.Join(members, " "), strings.Join(reports, " "))
	j := NewJudge(nil, nil, Settings{Probes: true})
	b.ReportAllocs()
	for b.Loop() {
		if v := j.Judge(start, "d1", fleet, nodes); len(v.Dead) != 20 {
			b.Fatal(len(v.Dead))
		}
	}
}
