package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/lab/stage"
)

// reach makes one request from a client's port, and returns the node of the pod that answers.
func reach(t *testing.T, s *stage.Stage, node string, port uint16, key ravel.ServiceKey) string {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	from := net.TCPAddrFromAddrPort(netip.AddrPortFrom(clientAddr(node, key.VIP.Is6()), port))
	dialer := net.Dialer{Deadline: deadline, LocalAddr: from}
	if key.Proto == ravel.UDP {
		dialer.LocalAddr = net.UDPAddrFromAddrPort(from.AddrPort())
	}
	var conn net.Conn
	must(t, s.Fleet.Node(node).Do(func() (err error) {
		conn, err = dialer.Dial(key.Proto.String(), netip.AddrPortFrom(key.VIP, key.Port).String())
		return err
	}))
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(deadline)
	_, err := fmt.Fprintln(conn, "who")
	must(t, err)
	answer := make([]byte, 512)
	n, err := conn.Read(answer)
	must(t, err)
	pod, _, _ := strings.Cut(string(answer[:n]), " ")
	on, _, _ := strings.Cut(pod, "-")
	return on
}

// traceFlow is a flow of which ravel trace is asked.
type traceFlow struct {
	node string // the client
	port uint16
	key  ravel.ServiceKey
}

func (f traceFlow) client() netip.AddrPort {
	return netip.AddrPortFrom(clientAddr(f.node, f.key.VIP.Is6()), f.port)
}

func someFlows(rng *rand.Rand, count int) []traceFlow {
	var flows []traceFlow
	ports := rng.Perm(10000)
	for i := range count {
		key := ravel.ServiceKey{VIP: vips[i%2], Proto: []ravel.Proto{ravel.TCP, ravel.UDP}[i/2%2], Port: 80}
		flows = append(flows, traceFlow{[]string{"c1", "c2"}[i/4%2], uint16(20000 + ports[i]), key})
	}
	return flows
}

// What `ravel trace` says of 100 random flows is what the kernel does with them, while one real server is drained and its
// new flows go elsewhere; and who it says is next gets the flow when the real server goes.
func TestTraceIsTheKernel(t *testing.T) {
	s := fleet(t)
	ready(t, s)
	rng, _ := random(t)
	undo := func(node string) {
		if out, err := s.Ravel(within(t, 20*time.Second), "d1", "drain", "--undo", node); err != nil {
			t.Errorf("ravel drain --undo %s: %v: %s", node, err, out)
		}
	}
	ravelSays(t, s, "d1", 0, "drain", "r2")
	t.Cleanup(func() { undo("r2") })
	agree(t, s, 30*time.Second)

	flows := someFlows(rng, 100)
	next := map[traceFlow]traced{}
	on := map[netip.Addr]int{}
	for i, f := range flows {
		d := s.Directors()[rng.IntN(3)]
		answer := trace(t, s, d, f.client(), f.key)
		if i%10 == 0 { // the words of an operator
			var said traced
			out := ravelSays(t, s, d, 0, "trace", "-o", "json", f.client().String(), netip.AddrPortFrom(f.key.VIP, 80).String()+"/"+f.key.Proto.String())
			if err := json.Unmarshal([]byte(out), &said); err != nil || said.Pick != answer.Pick || said.Next != answer.Next {
				t.Errorf("ravel trace: %v, the process says %+v:\n%s", err, answer, out)
			}
		}
		if len(answer.Agree) != 3 {
			t.Errorf("%s: of %s to %s agree only %v", d, f.client(), f.key, answer.Agree)
		}
		if node := reach(t, s, f.node, f.port, f.key); nodeAddr(node, f.key.VIP) != answer.Pick {
			t.Errorf("%s: %s to %s goes to %s, ravel trace says %s", d, f.client(), f.key, node, answer.Pick)
		}
		next[f] = answer
		on[answer.Pick]++
	}
	t.Logf("100 flows went where they were said to go: %v", on)

	ravelSays(t, s, "d2", 0, "drain", "r3")
	t.Cleanup(func() { undo("r3") })
	agree(t, s, 30*time.Second)
	moved := 0
	for _, f := range flows {
		want := next[f].Pick
		if want == nodeAddr("r3", f.key.VIP) {
			want = next[f].Next
			moved++
		}
		if answer := trace(t, s, "d3", f.client(), f.key); answer.Pick != want {
			t.Errorf("%s to %s goes to %s without r3, want %s", f.client(), f.key, answer.Pick, want)
		}
	}
	if moved == 0 {
		t.Error("no flow was on r3: the test shows too little")
	}
}

// planned is what a test reads of `ravel plan -o json`.
type planned struct {
	Complete bool
	Services []struct {
		VIP                      netip.Addr
		Protocol                 ravel.Proto
		Begin, End               struct{ Slots, Moved, Exposed int }
		Live, OnLeaving, Exposed int
	}
}

// What `ravel plan` says of a change is what comes of it: as many slots move, and when a director is lost then, as many
// of its flows break, to the flow. There are two directors, so that all flows of the one go to the other. The plan of a
// removal, whose drain must be over first, is for RAVEL_TEST_PLANS=3.
func TestPlanIsWhatHappens(t *testing.T) {
	s := fleetWith(t, []string{"--drain", "20s"}, nil)
	must(t, s.Process("d3").Stop(within(t, 30*time.Second)))
	must(t, s.Change(func(d *stage.Document) { d.Directors = []string{"d1", "d2"} }))
	for _, d := range s.Directors() { // no flows of earlier tests
		must(t, s.Process(d).Kill())
		forget(t, s, d)
		must(t, s.Start(d))
	}
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 2))
	backing := func(without string) func() {
		return func() {
			must(t, s.Change(func(d *stage.Document) {
				d.Endpoints = nil
				d.Back("web", slices.DeleteFunc(slices.Clone(s.Pods), func(p stage.Pod) bool { return p.Node == without })...)
			}))
		}
	}
	for i, c := range []struct {
		plan             string
		before, do, undo func()
		end              bool // the director is lost when the drain is over, else when it has begun
	}{
		{"add r4=3", backing("r4"), backing(""), func() {}, false},
		{"drain r2", func() {}, func() { ravelSays(t, s, "d2", 0, "drain", "r2") }, func() { ravelSays(t, s, "d2", 0, "drain", "--undo", "r2") }, false},
		{"remove r3", func() {}, backing("r3"), backing(""), true},
	} {
		if i >= number(t, "RAVEL_TEST_PLANS", 2) {
			break
		}
		t.Run(c.plan, func(t *testing.T) {
			c.before()
			l := &longFlows{t: t, s: s, name: c.plan[:3]}
			settle := func(gone string) {
				t.Helper()
				eventually(t, 40*time.Second, func() error {
					table, drained, err := alike(t.Context(), s, "d1", "d2")
					if err == nil {
						err = asWanted(table, takers(s.Document(), drained))
					}
					for key, text := range table {
						if gone != "" && strings.Contains(text, nodeAddr(gone, key.VIP).String()) {
							return fmt.Errorf("%s is still there: %s", gone, text)
						}
					}
					return err
				})
			}
			settle("")
			if c.plan[:3] == "add" {
				settle("r4") // it has drained
			}
			l.open(400)
			out, err := s.Ravel(within(t, 30*time.Second), "d1", append([]string{"plan", "-o", "json"}, strings.Fields(c.plan)...)...)
			must(t, err)
			var plan planned
			if err := json.Unmarshal([]byte(out), &plan); err != nil || !plan.Complete || len(plan.Services) != 4 {
				t.Fatalf("ravel plan %s: %v\n%s", c.plan, err, out)
			}
			today := map[ravel.ServiceKey]*maglev.Table{}
			exposed, live, leaving := 0, 0, 0
			for _, v := range plan.Services {
				key := ravel.ServiceKey{VIP: v.VIP, Proto: v.Protocol, Port: 80}
				today[key], _ = tableOf(t, s, "d1", key)
				if v.Protocol != ravel.TCP {
					continue // what datagrams of earlier tests left
				}
				if v.Exposed > 0 {
					t.Errorf("%s: %d flows are exposed before anything happened", key, v.Exposed)
				}
				live, leaving = live+v.Live, leaving+v.OnLeaving
				if exposed += v.Begin.Exposed; c.end {
					exposed += v.End.Exposed - v.Begin.Exposed
				}
			}
			before, _ := l.calm()

			c.do()
			gone := ""
			if c.end {
				gone = strings.Fields(c.plan)[1]
			}
			settle(gone)
			for _, v := range plan.Services {
				key := ravel.ServiceKey{VIP: v.VIP, Proto: v.Protocol, Port: 80}
				then, _ := tableOf(t, s, "d1", key)
				// From today to the end it may be fewer slots than begin and end move one after the other.
				if slots, _ := maglev.Moved(today[key], then); !c.end && slots != v.Begin.Slots || slots == 0 || slots > v.Begin.Slots+v.End.Slots {
					t.Errorf("%s: %d slots moved, the plan says %d and then %d", key, slots, v.Begin.Slots, v.End.Slots)
				}
			}
			after, broken := l.calm()
			powerOff(t, s, "d1")
			must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 1))
			end, nowBroken := l.calm()
			t.Logf("%d live flows of d1, %d of them on who leaves; open %v, then %v; %d break with d1, the plan says %d; open %v",
				live, leaving, before, after, nowBroken-broken, exposed, end)
			if nowBroken-broken != exposed {
				t.Errorf("%d flows broke, the plan says %d: %q", nowBroken-broken, exposed, l.why)
			}
			if live < 50 || exposed == 0 && !c.end {
				t.Errorf("%d live flows, %d exposed: the test shows too little", live, exposed)
			}
			l.stop()
			forget(t, s, "d1")
			powerOn(t, s, "d1")
			must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 2))
			c.undo()
			settle("")
		})
		if t.Failed() {
			return
		}
	}
}
