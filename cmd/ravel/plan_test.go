package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/maglev"
)

// connect opens flows of web where the kernel's table has them.
func (r *rig) connect(n int) {
	v, _ := serviceOf(r.kernel, web)
	table := maglev.Build(maglev.DefaultSize, v)
	for i := range n {
		c := connection{service: web, client: netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), 40000), live: true}
		at, _ := table.Pick(c.client)
		c.real = v.RealServers[at].Addr
		r.open = append(r.open, c)
	}
}

const planLegend = `
Of 4093 slots. Begin: drains begin, newcomers rise. End: the drains are over. Connections are those of d1:
live today, exposed if they break should it be lost, leaving if their real server is gone at the end.
`

func TestPlan(t *testing.T) {
	none := func(*rig) {}
	for _, test := range []struct {
		name   string
		change func(*rig)
		args   string
		code   int
		stdout string
		stderr string
	}{
		{"drain", none, "drain r3", exitOK, `
SERVICE                NAME            BEGIN: SLOTS  SHARE  EXPOSED  END: SLOTS  SHARE  EXPOSED  TODAY: LIVE  EXPOSED  LEAVING  REMARK
tcp 192.0.2.80:80      default/web:p   1023          25.0%  46       1034        16.9%  1        200          0        46       -
tcp [2001:db8::80]:80  default/web6:p  1023          25.0%  0        1041        17.1%  0        0            0        0        -
` + planLegend, ""},
		{"what is not there is told", none, "drain r9", exitUsage, "",
			"ravel: \"r9\" is no director and no node of this fleet; there are: directors d1, d2, d3; nodes r1, r2, r3, r4\n"},
		{"remove what is not there", none, "remove r9", exitUsage, "",
			"ravel: \"r9\" is no director and no node of this fleet; there are: directors d1, d2, d3; nodes r1, r2, r3, r4\n"},
		{"remove a director", none, "remove d1", exitUsage, "",
			"ravel: \"d1\" is no director and no node of this fleet; there are: directors d1, d2, d3; nodes r1, r2, r3, r4\n"},
		{"add what is not there", none, "add r9", exitUsage, "",
			"ravel: \"r9\" is no director and no node of this fleet; there are: directors d1, d2, d3; nodes r1, r2, r3, r4; " +
				"a node that nobody knows yet is added by its address\n"},
		{"add what is there", none, "add r3", exitOK, `
SERVICE            NAME           BEGIN: SLOTS  SHARE  EXPOSED  END: SLOTS  SHARE  EXPOSED  TODAY: LIVE  EXPOSED  LEAVING  REMARK
udp 192.0.2.53:53  default/dns:p  2047          50.0%  0        0           0.0%   0        0            0        0        -
` + planLegend, ""},
		{"add by address", none, "add 10.0.0.99=2", exitOK, "", ""},
		{"the last one", none, "drain r1", exitNotWell, "", "ravel: udp 192.0.2.53:53 would have no real server for new flows\n"},
		{"of what is drained already", func(r *rig) {
			r.in.Agreed.Drained["r3"] = true
			_ = r.set("drain/r3", "on")
		}, "drain r3", exitOK, "no slot moves, and no connection\n", "ravel: r3 is drained by d1\n"},
		{"frozen", func(r *rig) { _ = r.set("freeze", "on") }, "drain r3", exitOK, "",
			"ravel: the fleet is frozen by d1: changes have no effect\nravel: the fleet is frozen: nothing comes before ravel freeze off\n"},
		{"directors wish differently", func(r *rig) {
			r.change("d2", func(s *ravel.Report) { s.Services[web] = ravel.ServiceReport{Wish: 1} })
		}, "drain r3", exitOK, "", "ravel: d2 asks for other real servers of 1 services: tables wait until the directors agree\n"},
		{"others drain already", func(r *rig) { r.weigh("10.0.0.1", 0, ravel.Draining) }, "drain r3", exitOK, "",
			"ravel: real servers join or drain already in 1 services: where this change makes a difference, that is counted too\n"},
		{"an unknown table size", func(r *rig) { r.change("d1", func(s *ravel.Report) { s.TableSize = 0 }) }, "drain r3", exitOK, "",
			"ravel: the table size of this kernel is not known yet; 4093 is what most have\n"},
		{"not settled", func(r *rig) { r.fleet.Settled = false }, "drain r3", exitFault, "", "has not heard from the fleet\n"},
		{"this director", none, "drain d1", exitOK, "tcp 192.0.2.80:80      default/web:p   0             0.0%   0        0           0.0%   0        200          0        0        -", ""},
		{"another director", none, "drain d2", exitFault, "", "run ravel plan drain d2 there\n"},
		{"the last director", func(r *rig) { r.state("d2", ravel.Dead); r.state("d3", ravel.Dead) }, "drain d1", exitNotWell, "",
			"ravel: without d1 no director of the fleet attracts packets\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, ravel.Director)
			r.connect(200)
			test.change(r)
			r.know()
			args := append([]string{"plan"}, strings.Split(test.args, " ")...)
			code, stdout, stderr := ravelWith(append(args, "--admin-socket", r.socket())...)
			if strings.HasPrefix(test.stdout, "\n") {
				golden(t, test.args, test.stdout, stdout)
			} else if !strings.Contains(stdout, test.stdout) {
				t.Errorf("it prints\n%s", stdout)
			}
			if code != test.code || test.stderr == "" && stderr != "" || !strings.HasSuffix(stderr, test.stderr) {
				t.Errorf("exit code %d, want %d; it says\n%swant\n%s", code, test.code, stderr, test.stderr)
			}
			if strings.Contains(stdout, "ravel:") || len(r.told) > 1 {
				t.Errorf("told %q; it prints\n%s", r.told, stdout)
			}
		})
	}
}

// What plan says of a drain is what the fleet's rosters and the kernel's picks then come to.
func TestPlanOfADrainIsWhatItComesTo(t *testing.T) {
	r := newRig(t, ravel.Director)
	r.connect(200)
	code, stdout, stderr := ravelWith("plan", "drain", "r3", "-o", "json", "--admin-socket", r.socket())
	var answer planAnswer
	if err := json.Unmarshal([]byte(stdout), &answer); err != nil || code != exitOK || !answer.Complete || len(answer.Services) != 2 {
		t.Fatalf("exit code %d, %v:\n%s%s", code, err, stdout, stderr)
	}
	said := answer.Services[0]
	s := scene{in: r.in, rosters: r.fleet.Rosters}
	before, _ := serviceOf(r.kernel, web)
	s.in.Agreed.Drained["r3"] = true
	begin, end := s.apply(true, true)
	moved := func(a, b ravel.VirtualService) (slots, flows int) {
		x, y := maglev.Build(maglev.DefaultSize, a), maglev.Build(maglev.DefaultSize, b)
		slots, _ = maglev.Moved(x, y)
		for _, c := range r.open {
			i, _ := x.Pick(c.client)
			j, _ := y.Pick(c.client)
			if a.RealServers[i].Addr != b.RealServers[j].Addr {
				flows++
			}
		}
		return slots, flows
	}
	then, _ := serviceOf(begin, web)
	last, _ := serviceOf(end, web)
	if slots, flows := moved(before, then); slots != said.Begin.Slots || flows != said.Begin.Moved || flows != said.OnLeaving {
		t.Errorf("at the begin %d slots and %d flows moved; said was %+v", slots, flows, said)
	}
	if slots, flows := moved(then, last); slots != said.End.Slots || flows != said.End.Moved {
		t.Errorf("at the end %d slots and %d flows moved; said was %+v", slots, flows, said)
	}
}

// A changed static file is read by the command and by the process; services that come and go are told.
func TestPlanOfAFile(t *testing.T) {
	r := newRig(t, ravel.Director)
	r.connect(50)
	file := write(t, "changed.yaml", planDocument)
	code, stdout, stderr := ravelWith("plan", file, "-o", "wide", "--admin-socket", r.socket())
	if code != exitOK || stderr != "" {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	for _, want := range []string{
		"tcp 192.0.2.80:80      default/web:p   4093          100.0%  50       0           0.0%   0        50           0        50       the service goes",
		"tcp 192.0.2.81:80      default/new", "a new service", "MOVED AT BEGIN",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("it prints\n%swithout %q", stdout, want)
		}
	}
	bad := write(t, "bad.yaml", "cluster: 7\n")
	if code, _, stderr := ravelWith("plan", bad, "--admin-socket", r.socket()); code != exitUsage || !strings.Contains(stderr, "bad.yaml") {
		t.Errorf("a bad file: exit code %d: %s", code, stderr)
	}
	for _, words := range []any{
		planWords{Verb: "file", Static: []byte("cluster: 7")}, planWords{Verb: "break"}, planWords{Verb: "drain"}, planWords{},
		planWords{Verb: "add", Nodes: []planNode{{Name: "r1", Weight: -1}}}, planWords{Verb: "drain", Nodes: []planNode{{Name: "r1"}, {Name: "r2"}}},
		map[string]any{"verb": "drain", "force": true},
	} {
		var answer planAnswer
		if err := admin.Post(t.Context(), r.socket(), "plan", words, &answer); err == nil || !strings.Contains(fmt.Sprintf("%T", err), "Refusal") {
			t.Errorf("%v: %v", words, err)
		}
	}
}

const planDocument = `
cluster:
  config:
    192.0.2.81:
      80: {namespace: default, service: new, portName: p, tcpEnabled: true}
fleet:
  asn: 65100
  directors:
    - {name: d1, addresses: [10.0.0.11]}
nodes:
  - {name: r1, addresses: [10.0.0.1]}
endpoints:
  - {namespace: default, service: new, portName: p, address: 10.1.1.1, port: 8080, node: r1}
`
