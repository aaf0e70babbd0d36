package main

import (
	"context"
	"encoding/json"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/agree"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/health"
)

// golden compares what a command prints, without the spaces at the ends of lines.
func golden(t *testing.T, name, want, got string) {
	t.Helper()
	trim := func(text string) string {
		lines := strings.Split(strings.Trim(text, "\n"), "\n")
		for i := range lines {
			lines[i] = strings.TrimRight(lines[i], " ")
		}
		return strings.Join(lines, "\n")
	}
	if diff := cmp.Diff(trim(want), trim(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// Each way in which a fleet is not well is said, and has an exit code; what is as it should be has none.
func TestMembers(t *testing.T) {
	dead := netip.MustParseAddr("10.0.0.3")
	for _, test := range []struct {
		name   string
		change func(*rig)
		code   int
		stdout string // all of it, or a part
		stderr string
	}{
		{"well", func(*rig) {}, exitOK, `
fleet ravel, as d1 sees it: 7 of 7 voting members

NAME  ROLE        STATE  ADDRESS         VERSION  SESSIONS  DIFFERS  HEALTH   NOTES
d1    director    alive  10.0.0.11:7946  1.0      2 of 2    -        -        this one
d2    director    alive  10.0.0.12:7946  1.0      2 of 2    none     -        -
d3    director    alive  10.0.0.13:7946  1.0      2 of 2    none     -        -
r1    realserver  alive  10.0.0.1:7946   1.0      -         -        healthy  -
r2    realserver  alive  10.0.0.2:7946   1.0      -         -        healthy  -
r3    realserver  alive  10.0.0.3:7946   1.0      -         -        healthy  -
r4    realserver  alive  10.0.0.4:7946   1.0      -         -        healthy  -
`, ""},
		{"a drained node is no fault", func(r *rig) { _ = r.set("drain/r3", "on") }, exitOK,
			"r3    realserver  alive  10.0.0.3:7946   1.0      -         -        healthy  drained by d1\n", ""},
		{"what directors say of themselves", func(r *rig) {
			r.change("d2", func(s *ravel.Report) { s.Withdrawn6, s.Unheard = true, 7 })
			r.change("d3", func(s *ravel.Report) { s.Dark = true })
		}, exitOK, "" +
			"d2    director    alive  10.0.0.12:7946  1.0      2 of 2    none     -        announces no IPv6, does not hear its API server\n" +
			"d3    director    alive  10.0.0.13:7946  1.0      2 of 2    none     -        attracts nothing (--attract=none)\n", ""},
		{"a dead real server is no fault of the fleet", func(r *rig) {
			r.verd.Dead[dead] = "silent to 3 of 3 directors"
			r.change("d1", func(s *ravel.Report) {
				s.Health[dead] = ravel.Silent
				s.Health[netip.MustParseAddr("10.0.0.4")] = ravel.Refused
			})
		}, exitOK, "10.0.0.3 dead: silent to 3 of 3 directors", ""},
		{"refused", func(r *rig) {
			r.change("d1", func(s *ravel.Report) { s.Health[dead] = ravel.Refused })
		}, exitOK, "r3    realserver  alive  10.0.0.3:7946   1.0      -         -        refused  -\n", ""},
		{"a suspect is there", func(r *rig) { r.state("d2", ravel.Suspect) }, exitOK, "d2    director    suspect", ""},
		{"a director that left", func(r *rig) { r.state("d2", ravel.Left) }, exitOK, "d2    director    left", ""},
		{"a dead director", func(r *rig) { r.state("d2", ravel.Dead) }, exitNotWell, "d2    director    dead", "ravel: director d2 is dead\n"},
		{"a director that never came", func(r *rig) {
			r.in.Fleet.Directors = append(r.in.Fleet.Directors, desired.FleetDirector{Name: "d4"})
		}, exitNotWell, "d4    director    absent  -               -        -         -        -        -\n",
			"ravel: director d4 of fleet.directors is not in the fleet: start it, with this --fleet and these keys, and let UDP and TCP to its gossip port through\n"},
		{"a node without an agent", func(r *rig) { r.fleet.Members = r.fleet.Members[:6] }, exitOK,
			"r4    realserver  absent  -               -        -         -        healthy  -\n", ""},
		{"frozen", func(r *rig) { _ = r.set("freeze", "on") }, exitNotWell, "the fleet is frozen by d1: changes have no effect\n",
			"ravel: the fleet is frozen by d1; end it by: ravel freeze off\n"},
		{"no majority", func(r *rig) { r.verd = health.Verdict{Seen: 3, Voters: 7} }, exitNotWell,
			"fleet ravel, as d1 sees it: 3 of 7 voting members, no majority\n", "ravel: no majority: 3 of 7 voting members are seen, so nobody is found dead\n"},
		{"not settled", func(r *rig) { r.fleet.Settled = false }, exitNotWell, "as d1 sees it: it has not heard from the fleet yet\n",
			"ravel: this director has not heard from the fleet yet\n"},
		{"a director that has not settled", func(r *rig) {
			r.change("d2", func(s *ravel.Report) { s.Services = nil })
		}, exitOK, "d2    director    alive  10.0.0.12:7946  1.0      2 of 2    -        -        has not settled\n", ""},
		{"for a moment tables may differ", func(r *rig) {
			r.change("d2", func(s *ravel.Report) {
				s.Services[web] = ravel.ServiceReport{Wish: 1, Table: 2, Available: s.Services[web].Available}
				delete(s.Services, dns)
				s.Sessions[netip.MustParseAddr("10.0.0.254")] = false
			})
		}, exitOK, "1 of 2    wish 2, table 2, flows 1", ""},
		{"for longer they may not", func(r *rig) {
			r.differ = []agree.Difference{{Service: web, Directors: []string{"d2", "d3"}, Since: time.Now().Add(-90 * time.Second), Table: true},
				{Service: dns, Directors: []string{"d2"}, Since: time.Now().Add(-15 * time.Second)}}
		}, exitNotWell, `
SERVICE            WHAT DIFFERS         ON      SINCE
tcp 192.0.2.80:80  Maglev table         d2, d3  1m30s ago
udp 192.0.2.53:53  who takes new flows  d2      15s ago
`, "ravel: directors hold different tables of 2 services; see ravel check\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, ravel.Director)
			test.change(r)
			r.know()
			socket := r.socket()
			code, stdout, stderr := ravelWith("members", "--admin-socket", socket)
			if test.name == "well" {
				golden(t, "members", test.stdout, stdout)
			} else if !strings.Contains(stdout, test.stdout) {
				t.Errorf("it prints\n%swithout\n%s", stdout, test.stdout)
			}
			if code != test.code || stderr != test.stderr {
				t.Errorf("exit code %d, want %d; it says %q, want %q", code, test.code, stderr, test.stderr)
			}
			code, stdout, _ = ravelWith("members", "-o", "json", "--admin-socket", socket)
			var answer membersAnswer
			if err := json.Unmarshal([]byte(stdout), &answer); err != nil || code != test.code || len(answer.Members) < 6 {
				t.Errorf("-o json: exit code %d, %v:\n%s", code, err, stdout)
			}
		})
	}
}

func TestMembersWide(t *testing.T) {
	r := newRig(t, ravel.Director)
	r.change("d3", func(s *ravel.Report) { s.TableSize = 0 })
	r.know()
	code, stdout, _ := ravelWith("members", "-o", "wide", "--admin-socket", r.socket())
	golden(t, "members -o wide", `
fleet ravel, as d1 sees it: 7 of 7 voting members

NAME  ROLE        STATE  ADDRESS         VERSION  SESSIONS  DIFFERS  HEALTH   NOTES     TABLE SIZE  SERVICES  REDIRECTS  WIRE  KEYS  ADDRESSES
d1    director    alive  10.0.0.11:7946  1.0      2 of 2    -        -        this one  4093        3         -          1     -     10.0.0.11
d2    director    alive  10.0.0.12:7946  1.0      2 of 2    none     -        -         4093        3         -          1     -     10.0.0.12
d3    director    alive  10.0.0.13:7946  1.0      2 of 2    none     -        -         unknown     3         -          1     -     10.0.0.13
r1    realserver  alive  10.0.0.1:7946   1.0      -         -        healthy  -         -           -         2          1     -     10.0.0.1
r2    realserver  alive  10.0.0.2:7946   1.0      -         -        healthy  -         -           -         2          1     -     10.0.0.2
r3    realserver  alive  10.0.0.3:7946   1.0      -         -        healthy  -         -           -         2          1     -     10.0.0.3
r4    realserver  alive  10.0.0.4:7946   1.0      -         -        healthy  -         -           -         2          1     -     10.0.0.4
`, stdout)
	if code != exitOK {
		t.Errorf("exit code %d", code)
	}
}

// A realserver does not hear what directors say of their tables, and judges nobody.
func TestMembersOfARealserver(t *testing.T) {
	r := newRig(t, ravel.Realserver)
	r.verd = health.Verdict{}
	for _, m := range r.fleet.Members {
		if m.Name != "r1" {
			delete(r.fleet.Reports, m.Name)
		}
	}
	r.know()
	code, stdout, stderr := ravelWith("members", "--admin-socket", r.socket())
	golden(t, "members", `
fleet ravel, as r1 sees it

NAME  ROLE        STATE  ADDRESS         VERSION  SESSIONS  DIFFERS  HEALTH  NOTES
d1    director    alive  10.0.0.11:7946  1.0      -         -        -       -
d2    director    alive  10.0.0.12:7946  1.0      -         -        -       -
d3    director    alive  10.0.0.13:7946  1.0      -         -        -       -
r1    realserver  alive  10.0.0.1:7946   1.0      -         -        -       this one
r2    realserver  alive  10.0.0.2:7946   1.0      -         -        -       -
r3    realserver  alive  10.0.0.3:7946   1.0      -         -        -       -
r4    realserver  alive  10.0.0.4:7946   1.0      -         -        -       -
`, stdout)
	if code != exitOK || stderr != "" {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

// Without a document it is not known who should be there.
func TestMembersBeforeAnythingIsKnown(t *testing.T) {
	r := newRig(t, ravel.Director)
	r.p = &process{role: r.p.role, settings: r.p.settings, file: r.p.file, gossip: r.p.gossip}
	code, _, stderr := ravelWith("members", "--admin-socket", r.socket())
	if code != exitNotWell || !strings.Contains(stderr, "no static file was good yet") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

// With --watch it is shown again and again, and an interrupt is no fault.
func TestMembersWatch(t *testing.T) {
	r := newRig(t, ravel.Director)
	_ = r.set("freeze", "on")
	socket := r.socket()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	shown := &interrupting{cancel: cancel}
	if err := newApp(shown, io.Discard).RunContext(ctx, []string{"ravel", "members", "--watch", "--admin-socket", socket}); err != nil {
		t.Error(err)
	}
	if got := strings.Count(shown.String(), "fleet ravel, as d1 sees it"); got != 1 {
		t.Errorf("shown %d times:\n%s", got, shown.String())
	}
	if code, _, _ := ravelWith("members", "--watch", "--admin-socket", socket+".not"); code != exitNotRunning {
		t.Errorf("nobody to watch: exit code %d", code)
	}
}

// interrupting ends a command once it has written a whole listing.
type interrupting struct {
	strings.Builder
	cancel func()
}

func (w *interrupting) Write(b []byte) (int, error) {
	n, err := w.Builder.Write(b)
	if text := w.String(); strings.Contains(text[max(0, strings.Index(text, "\nr4")):], "healthy") {
		w.cancel()
	}
	return n, err
}
