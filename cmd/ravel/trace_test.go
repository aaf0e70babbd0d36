package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/internal/roster"
)

// weigh gives a real server of web another weight in the kernel, and its entry another state.
func (r *rig) weigh(addr string, weight int, state ravel.RosterState) {
	a := netip.MustParseAddr(addr)
	r.kernel = slices.Clone(r.kernel)
	for i := range r.kernel {
		if r.kernel[i].Key != web {
			continue
		}
		r.kernel[i].RealServers = slices.Clone(r.kernel[i].RealServers)
		for j := range r.kernel[i].RealServers {
			if rs := &r.kernel[i].RealServers[j]; rs.Addr == a {
				rs.Weight = weight
			}
		}
	}
	e, _ := r.fleet.Rosters[web].Find(a)
	e.Rev++
	e.State = state
	if state == ravel.Draining {
		e.By = "d2"
	}
	r.fleet.Rosters[web] = roster.Merge(r.fleet.Rosters[web], e)
	r.in.Agreed.Rosters = r.fleet.Rosters
	r.report()
}

func nodeIs(name string) func(desired.Endpoint) bool {
	return func(e desired.Endpoint) bool { return e.Node == name }
}

// lines are what a trace prints above the list.
func lines(stdout string) map[string]string {
	said := map[string]string{}
	for line := range strings.Lines(stdout) {
		if len(line) < 12 || strings.HasPrefix(line, "PLACE") {
			break
		}
		said[strings.TrimSpace(line[:12])] = strings.TrimSpace(line[12:])
	}
	return said
}

// Whatever flow is asked about, the answer is the kernel's pick.
func TestTraceIsTheKernelsPick(t *testing.T) {
	seed := seedOf(t)
	for round := range 20 {
		random := rand.New(rand.NewPCG(seed, uint64(round)))
		s := newScene(random)
		kernel := s.services()
		s.connect(kernel, 20)
		for _, c := range s.open {
			v, _ := serviceOf(kernel, c.service)
			want, ok := maglev.Build(maglev.DefaultSize, v).Pick(c.client)
			tr := tracing{c: computed{inputs: s.in, state: ravel.State{Services: kernel}}, fleet: ravel.Fleet{Rosters: s.rosters}, traceAnswer: traceAnswer{
				Director:   "d1",
				traceWords: traceWords{Client: c.client.Addr(), Port: c.client.Port(), VIP: c.service.VIP, Proto: c.service.Proto, To: c.service.Port},
			}}
			tr.look(kernel)
			if c.client.Port() == 0 && v.Flags&ravel.HashPort != 0 {
				continue
			}
			if tr.Pick.IsValid() != ok || ok && tr.Pick != v.RealServers[want].Addr {
				t.Errorf("round %d, %s to %s: %s, want %d of %+v", round, c.client, c.service, tr.Pick, want, v.RealServers)
			}
			if tr.Why == "" || tr.Pick.IsValid() && tr.Pick == tr.Next {
				t.Errorf("round %d, %s to %s: %+v", round, c.client, c.service, tr.traceAnswer)
			}
			if tr.Pick.IsValid() && (tr.Tries == 0) != (tr.Pick == tr.Owner) {
				t.Errorf("round %d, %s to %s: %d tries from %s to %s", round, c.client, c.service, tr.Tries, tr.Owner, tr.Pick)
			}
			if !strings.Contains(tr.Why, "port 20") && tr.Wanted != nil {
				t.Errorf("round %d: the kernel holds what is wanted, and yet %s", round, tr.Wanted)
			}
		}
	}
}

func TestTrace(t *testing.T) {
	const flow = "198.51.100.7:40000 192.0.2.80:80" // slot 924, of r1
	for _, test := range []struct {
		name   string
		change func(*rig)
		flow   string
		says   map[string]string
		stderr string
	}{
		{"well", func(*rig) {}, flow, map[string]string{
			"flow": "198.51.100.7:40000 to tcp 192.0.2.80:80", "service": "default/web:p, scheduler mh with mh-fallback",
			"slot": "924 of 4093, of 10.0.0.1 (r1)", "pick": "10.0.0.1 (r1): it owns the slot and takes new flows",
			"next": "10.0.0.4 (r4), if that one went away", "open flow": "none here", "directors": "all 3 pick the same: d1, d2, d3",
			"announced": "not by this director, d1: its real servers wait to rise",
		}, "ravel: this director does not announce the VIP: its real servers wait to rise\n"},
		{"its port does not matter", func(*rig) {}, "198.51.100.7 192.0.2.80:80", map[string]string{
			"flow": "198.51.100.7 to tcp 192.0.2.80:80", "pick": "10.0.0.1 (r1): it owns the slot and takes new flows", "open flow": "",
		}, "does not announce"},
		{"IPv6", func(*rig) {}, "[2001:db8::7]:40000 [2001:db8::80]:80/tcp", map[string]string{
			"flow": "[2001:db8::7]:40000 to tcp [2001:db8::80]:80", "slot": "1131 of 4093, of 2001:db8:1::3 (r3)",
		}, "does not announce"},
		{"where it is open", func(r *rig) {
			r.open = []connection{{service: web, client: netip.MustParseAddrPort("198.51.100.7:40000"), real: netip.MustParseAddr("10.0.0.1")}}
		}, flow, map[string]string{"open flow": "pinned to 10.0.0.1 (r1), as the table has it"}, ""},
		{"where it is open elsewhere", func(r *rig) {
			r.open = []connection{{service: web, client: netip.MustParseAddrPort("198.51.100.7:40001"), real: netip.MustParseAddr("10.0.0.2")},
				{service: web, client: netip.MustParseAddrPort("198.51.100.7:40000"), real: netip.MustParseAddr("10.0.0.3")}}
		}, flow, map[string]string{
			"open flow": "pinned to 10.0.0.3 (r3) while this director lives; another director would send it to 10.0.0.1 (r1)",
		}, ""},
		{"it drains", func(r *rig) {
			r.in.Cluster.Endpoints = slices.DeleteFunc(r.in.Cluster.Endpoints, nodeIs("r1"))
			r.weigh("10.0.0.1", 0, ravel.Draining)
		}, flow, map[string]string{
			"slot": "924 of 4093, of 10.0.0.1 (r1)",
			"pick": "10.0.0.4 (r4): 10.0.0.1 (r1) owns the slot, but drains, as d2 began it; fallback, try 1",
			"next": "10.0.0.2 (r2), if that one went away",
		}, ""},
		{"it is dead", func(r *rig) {
			dead := netip.MustParseAddr("10.0.0.1")
			r.verd.Dead[dead], r.in.Agreed.Dead[dead] = "silent to 3 of 3 directors", true
			r.weigh("10.0.0.1", 0, ravel.Active)
		}, flow, map[string]string{
			"pick": "10.0.0.4 (r4): 10.0.0.1 (r1) owns the slot, but is dead: silent to 3 of 3 directors; fallback, try 1",
		}, ""},
		{"it is drained by hand", func(r *rig) {
			r.in.Agreed.Drained["r1"] = true
			_ = r.set("drain/r1", "on")
			r.weigh("10.0.0.1", 0, ravel.Active)
		}, flow, map[string]string{
			"pick": "10.0.0.4 (r4): 10.0.0.1 (r1) owns the slot, but is drained by d1; fallback, try 1", "fleet": "r1 is drained by d1",
		}, ""},
		{"its pods are gone", func(r *rig) {
			r.in.Cluster.Endpoints = slices.DeleteFunc(r.in.Cluster.Endpoints, nodeIs("r1"))
			r.weigh("10.0.0.1", 0, ravel.Active)
		}, flow, map[string]string{
			"pick": "10.0.0.4 (r4): 10.0.0.1 (r1) owns the slot, but has no ready pod of the service, or its node is not ready; fallback, try 1",
		}, ""},
		{"nobody falls back", func(r *rig) {
			r.weigh("10.0.0.1", 0, ravel.Draining)
			for i := range r.kernel {
				if r.kernel[i].Key == web {
					r.kernel[i].Flags = 0
				}
			}
		}, flow, map[string]string{
			"pick": "none: 10.0.0.1 (r1) owns the slot, but drains, as d2 began it; without mh-fallback nobody else takes it, " +
				"and the client gets ICMP port unreachable",
		}, "nobody gets this flow"},
		{"all drain", func(r *rig) {
			for i := range 4 {
				r.weigh(fmt.Sprintf("10.0.0.%d", i+1), 0, ravel.Draining)
			}
		}, flow, map[string]string{"pick": "none: no real server takes new flows: the client gets ICMP port unreachable", "next": ""}, "nobody gets this flow"},
		{"another is wanted", func(r *rig) { r.weigh("10.0.0.1", 0, ravel.Active) }, flow, map[string]string{
			"pick":   "10.0.0.4 (r4): 10.0.0.1 (r1) owns the slot, but is about to take new flows; fallback, try 1",
			"wanted": "the kernel is about to hold another table, in which 10.0.0.1 (r1) gets the flow",
		}, ""},
		{"port 20", func(*rig) {}, "198.51.100.7:20 192.0.2.80:80", map[string]string{
			"pick": "none: IPVS takes what comes from port 20 for the data of FTP and schedules no new flow from it: it meets this host's own programs",
		}, "nobody gets this flow"},
		{"the port decides", func(*rig) {}, "198.51.100.7 192.0.2.53:53/udp", map[string]string{
			"pick": "the client's port decides, too (mh-port): name one for its real server; of the ports 1024 to 65535 each real server gets PORTS",
			"slot": "", "next": "",
		}, "does not announce"},
		{"another scheduler", func(r *rig) {
			for i := range r.kernel {
				r.kernel[i].Scheduler = "wrr"
			}
		}, flow, map[string]string{
			"pick":      "the scheduler wrr picks by what this director has done before: only mh can be told beforehand",
			"directors": "",
		}, ""},
		{"no such service", func(*rig) {}, "198.51.100.7:40000 192.0.2.80:81", map[string]string{
			"pick": "none: no service has this VIP, protocol and port, and this director does not hold the VIP: packets for it are none of its",
		}, "nobody gets this flow"},
		{"directors differ", func(r *rig) {
			r.change("d2", func(s *ravel.Report) {
				w := s.Services[web]
				w.Table++
				s.Services[web] = w
			})
			r.change("d3", func(s *ravel.Report) {
				w := s.Services[web]
				w.Available++
				w.Wish++
				s.Services[web] = w
			})
		}, flow, map[string]string{
			"directors": "d2 has another Maglev table; d3 has other real servers for new flows, because its inputs ask for others; the same on d1",
		}, "directors pick differently; see ravel members"},
		{"a director does not say", func(r *rig) { r.change("d2", func(s *ravel.Report) { s.Services = nil }) }, flow, map[string]string{
			"directors": "not said yet by d2; the same on d1, d3",
		}, ""},
		{"a dead director does not count", func(r *rig) { r.state("d2", ravel.Dead) }, flow, map[string]string{"directors": "all 2 pick the same: d1, d3"}, ""},
		{"alone", func(r *rig) { r.state("d2", ravel.Dead); r.state("d3", ravel.Left) }, flow, map[string]string{"directors": "no other director is there"}, ""},
		{"an unknown table size", func(r *rig) { r.change("d1", func(s *ravel.Report) { s.TableSize = 0 }) }, flow, map[string]string{
			"table size": "not known yet; 4093 is what most kernels have",
		}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, ravel.Director)
			test.change(r)
			r.know()
			socket := r.socket()
			args := append([]string{"trace"}, strings.Split(test.flow, " ")...)
			code, stdout, stderr := ravelWith(append(args, "--admin-socket", socket)...)
			said := lines(stdout)
			for what, want := range test.says {
				if said[what] != want {
					t.Errorf("%s: %q, want %q", what, said[what], want)
				}
			}
			if code != exitNotWell || !strings.Contains(stderr, test.stderr) {
				t.Errorf("exit code %d: %s", code, stderr)
			}
			code, stdout, _ = ravelWith(append(args, "-o", "json", "--admin-socket", socket)...)
			var answer traceAnswer
			if err := json.Unmarshal([]byte(stdout), &answer); err != nil || code != exitNotWell || answer.Why == "" || answer.Director != "d1" {
				t.Errorf("-o json: exit code %d, %v:\n%s", code, err, stdout)
			}
		})
	}
}

// What a trace prints, whole: of a VIP that is announced and a flow that is served.
func TestTracePrints(t *testing.T) {
	r := newRig(t, ravel.Director)
	answers := map[string]admin.Command{"trace": func(_ context.Context, read func(any) error) (any, error) {
		tr := tracing{c: computed{inputs: r.in, state: ravel.State{Services: r.kernel}}, fleet: r.fleet,
			vip: vipStatus{VIP: web.VIP, Held: true, Announced: true}, guarded: true, traceAnswer: traceAnswer{Director: "d1"}}
		if err := read(&tr.traceWords); err != nil {
			return nil, err
		}
		tr.look(r.kernel)
		return tr.traceAnswer, nil
	}}
	socket := serveWith(t, nil, answers)
	code, stdout, stderr := ravelWith("trace", "198.51.100.7", "192.0.2.80:80", "--admin-socket", socket)
	golden(t, "trace", `
flow        198.51.100.7 to tcp 192.0.2.80:80
service     default/web:p, scheduler mh with mh-fallback
slot        924 of 4093, of 10.0.0.1 (r1)
pick        10.0.0.1 (r1): it owns the slot and takes new flows
next        10.0.0.4 (r4), if that one went away
directors   all 3 pick the same: d1, d2, d3
announced   by this director, d1

PLACE  REAL SERVER  NODE  STATE   WEIGHT  LAST WEIGHT  SLOTS  WHY NOT
1      10.0.0.4     r4    active  2       2            1024   -
2      10.0.0.3     r3    active  2       2            1023   -
3      10.0.0.2     r2    active  2       2            1023   -
4      10.0.0.1     r1    active  2       2            1023   -
`, stdout)
	if code != exitOK || stderr != "" {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	// Where the port decides, and has not been said, each real server's part is told.
	for i := range r.kernel {
		r.kernel[i].Flags |= ravel.HashPort
	}
	code, stdout, stderr = ravelWith("trace", "198.51.100.7", "192.0.2.80:80", "--admin-socket", socket)
	golden(t, "trace without the port", `
PLACE  REAL SERVER  NODE  STATE   WEIGHT  LAST WEIGHT  SLOTS  PORTS          WHY NOT
1      10.0.0.4     r4    active  2       2            1024   16122 (25.0%)  -
2      10.0.0.3     r3    active  2       2            1023   16103 (25.0%)  -
3      10.0.0.2     r2    active  2       2            1023   16124 (25.0%)  -
4      10.0.0.1     r1    active  2       2            1023   16163 (25.1%)  -
`, stdout[strings.Index(stdout, "PLACE"):])
	if code != exitOK || stderr != "" {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	// Of a port that no service has, on a VIP that is held.
	code, stdout, _ = ravelWith("trace", "198.51.100.7", "192.0.2.80:81", "--admin-socket", socket)
	if want := "no service has this VIP, protocol and port: the guard rejects it, TCP by a reset, all else by ICMP port unreachable"; code != exitNotWell ||
		lines(stdout)["pick"] != "none: "+want {
		t.Errorf("exit code %d:\n%s", code, stdout)
	}
}

// What is no question of this role, or no question at all, says so.
func TestTraceAndPlanAreDirectors(t *testing.T) {
	r := newRig(t, ravel.Realserver)
	socket := r.socket()
	for _, line := range []string{"trace 198.51.100.7 192.0.2.80:80", "plan drain r1"} {
		code, _, stderr := ravelWith(append(strings.Split(line, " "), "--admin-socket", socket)...)
		if code != exitNotRunning || !strings.Contains(stderr, "no director runs here") {
			t.Errorf("ravel %s: exit code %d: %s", line, code, stderr)
		}
	}
	r = newRig(t, ravel.Director)
	socket = r.socket()
	for _, words := range []any{
		traceWords{}, traceWords{Client: web.VIP, VIP: web6.VIP, Proto: ravel.TCP, To: 80},
		map[string]any{"client": "198.51.100.7", "more": 1}, map[string]any{"client": "here"}, 7,
	} {
		var answer traceAnswer
		var refusal *admin.Refusal
		if err := admin.Post(t.Context(), socket, "trace", words, &answer); !errors.As(err, &refusal) || !refusal.Usage {
			t.Errorf("%v: %v", words, err)
		}
	}
}
