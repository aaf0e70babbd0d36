package main

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/check"
	"github.com/ravel-lb/ravel/internal/desired"
)

func TestDrain(t *testing.T) {
	only := func(r *rig) { // d1 alone attracts
		for _, name := range []string{"d2", "d3"} {
			r.change(name, func(s *ravel.Report) {
				s.Sessions = map[netip.Addr]bool{netip.MustParseAddr("10.0.0.254"): false}
			})
		}
	}
	none := func(*rig) {}
	for _, test := range []struct {
		name   string
		change func(*rig)
		args   string
		code   int
		told   string
		stdout string
		stderr string
	}{
		{"a node", none, "drain r2", exitOK, "drain/r2=on",
			"r2 is drained: it takes no new flows, keeps those that it has, and leaves the tables when its drain is over; undo it by: ravel drain --undo r2\n", ""},
		{"this director", none, "drain", exitOK, "drain/d1=on", "d1 is drained: it announces nothing and serves on; undo it by: ravel drain --undo d1\n", ""},
		{"another director", none, "drain d3", exitOK, "drain/d3=on", "d3 is drained: it announces nothing and serves on; undo it by: ravel drain --undo d3\n", ""},
		{"again", func(r *rig) { _ = r.set("drain/r2", "on"); r.told = nil }, "drain r2", exitOK, "",
			"r2 is drained already, by d1; undo it by: ravel drain --undo r2\n", ""},
		{"undone", func(r *rig) { _ = r.set("drain/r2", "on"); r.told = nil }, "drain r2 --undo", exitOK, "drain/r2=",
			"r2 is drained no more: it comes back to its services\n", ""},
		{"a director undone", func(r *rig) { _ = r.set("drain/d1", "on"); r.told = nil }, "drain --undo", exitOK, "drain/d1=",
			"d1 is drained no more: it announces again what it serves\n", ""},
		{"undone what is not", none, "drain --undo r2", exitOK, "", "r2 is not drained\n", ""},
		{"undone whom nobody knows", func(r *rig) { _ = r.set("drain/r9", "on"); r.told = nil }, "drain --undo r9", exitOK, "drain/r9=",
			"r9 is drained no more: it comes back to its services\n", ""},
		{"whom nobody knows", none, "drain r9", exitUsage, "", "",
			"ravel: \"r9\" is no director and no node of this fleet; there are: directors d1, d2, d3; nodes r1, r2, r3, r4; --force drains it all the same\n"},
		{"whom nobody knows, by force", none, "drain r9 --force", exitOK, "drain/r9=on",
			"r9 is drained from its first moment; undo it by: ravel drain --undo r9\n", "ravel: nobody of the name r9 is known here\n"},
		{"what is no name", none, "drain a\u00a0b --force", exitUsage, "", "", "ravel: \"a\\u00a0b\": want a name of 253 characters at most, without spaces\n"},
		{"the last of a service", none, "drain r1", exitFault, "", "",
			"ravel: without r1 udp 192.0.2.53:53 has no real server for new flows; nothing was done, --force drains it all the same\n"},
		{"the last of a service, by force", none, "drain --force r1", exitOK, "drain/r1=on",
			"r1 is drained: it takes no new flows, keeps those that it has, and leaves the tables when its drain is over; undo it by: ravel drain --undo r1\n",
			"ravel: without r1 udp 192.0.2.53:53 has no real server for new flows\n"},
		{"the last director that attracts", only, "drain", exitFault, "", "",
			"ravel: without d1 no director of the fleet attracts packets; nothing was done, --force drains it all the same\n"},
		{"one that attracts nothing", only, "drain d2", exitOK, "drain/d2=on",
			"d2 is drained: it announces nothing and serves on; undo it by: ravel drain --undo d2\n", ""},
		{"the last director beside drained ones", func(r *rig) {
			_, _ = r.set("drain/d2", "on"), r.set("drain/d3", "on")
			r.told = nil
		}, "drain d1", exitFault, "", "", "ravel: without d1 no director of the fleet attracts packets; nothing was done, --force drains it all the same\n"},
		{"a dead director", func(r *rig) { only(r); r.state("d1", ravel.Dead) }, "drain d1", exitOK, "drain/d1=on",
			"d1 is drained: it announces nothing and serves on; undo it by: ravel drain --undo d1\n", ""},
		{"frozen", func(r *rig) { _ = r.set("freeze", "on"); r.told = nil }, "drain r2", exitOK, "drain/r2=on",
			"r2 is drained: it takes no new flows, keeps those that it has, and leaves the tables when its drain is over; undo it by: ravel drain --undo r2\n",
			"ravel: the fleet is frozen, so this has no effect before: ravel freeze off\n"},
		{"not settled", func(r *rig) { r.fleet.Settled = false }, "drain r2", exitFault, "", "",
			"ravel: this director has not heard from the fleet yet; nothing was done, try again in a moment\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, ravel.Director)
			test.change(r)
			r.know()
			args := strings.Split(test.args, " ")
			code, stdout, stderr := ravelWith(append(args, "--admin-socket", r.socket())...)
			if told := strings.Join(r.told, " "); code != test.code || stdout != test.stdout || stderr != test.stderr || told != test.told {
				t.Errorf("exit code %d, want %d; told %q, want %q\n%s%s", code, test.code, told, test.told, stdout, stderr)
			}
		})
	}
}

// A realserver drains its own node, and knows what that would leave as a director does.
func TestDrainOnARealserver(t *testing.T) {
	r := newRig(t, ravel.Realserver)
	socket := r.socket()
	code, _, stderr := ravelWith("drain", "--admin-socket", socket)
	if code != exitFault || !strings.Contains(stderr, "without r1 udp 192.0.2.53:53 has no real server") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	code, stdout, _ := ravelWith("drain", "r2", "-o", "json", "--admin-socket", socket)
	var answer setAnswer
	if err := json.Unmarshal([]byte(stdout), &answer); err != nil || code != exitOK || !answer.Changed || !slices.Equal(r.told, []string{"drain/r2=on"}) {
		t.Errorf("exit code %d, %v, told %q:\n%s", code, err, r.told, stdout)
	}
}

func TestFreeze(t *testing.T) {
	r := newRig(t, ravel.Director)
	socket := r.socket()
	for _, step := range []struct {
		word, says string
		code       int
	}{
		{"status", "the fleet is not frozen", exitOK},
		{"off", "the fleet is not frozen", exitOK},
		{"on", "the fleet is frozen: directors hold their last state, and changes have no effect; undo it by: ravel freeze off", exitOK},
		{"on", "the fleet is frozen already, by d1", exitOK},
		{"status", "the fleet is frozen by d1; undo it by: ravel freeze off", exitNotWell},
		{"off", "the fleet goes on: what changed meanwhile takes effect now", exitOK},
		{"status", "the fleet is not frozen", exitOK},
	} {
		code, stdout, stderr := ravelWith("freeze", step.word, "--admin-socket", socket)
		if code != step.code || stdout != step.says+"\n" || stderr != "" {
			t.Errorf("freeze %s: exit code %d:\n%s%s", step.word, code, stdout, stderr)
		}
	}
	if got := strings.Join(r.told, " "); got != "freeze=on freeze=" {
		t.Errorf("told %q", got)
	}
	r.fleet.Settled = false
	r.know()
	if code, _, stderr := ravelWith("freeze", "on", "--admin-socket", socket); code != exitFault || !strings.Contains(stderr, "has not heard from the fleet yet") {
		t.Errorf("not settled: exit code %d: %s", code, stderr)
	}
}

// Every listing tells what an operator should not forget, beside what it lists.
func TestEveryListingTellsOfFreezeAndDrain(t *testing.T) {
	r := newRig(t, ravel.Director)
	socket := r.socket()
	if _, _, stderr := ravelWith("services", "--admin-socket", socket); stderr != "" {
		t.Errorf("nothing stands, and services says %q", stderr)
	}
	_, _ = r.set("freeze", "on"), r.set("drain/r3", "on")
	for _, name := range []string{"vips", "services"} {
		for _, format := range []string{"table", "json"} {
			_, stdout, stderr := ravelWith(name, "-o", format, "--admin-socket", socket)
			for _, line := range []string{"ravel: the fleet is frozen by d1: changes have no effect\n", "ravel: r3 is drained by d1\n"} {
				if !strings.Contains(stderr, line) {
					t.Errorf("%s -o %s says %q, without %q", name, format, stderr, line)
				}
			}
			if strings.Contains(stdout, "ravel:") || format == "json" && !json.Valid([]byte(stdout)) {
				t.Errorf("%s -o %s prints:\n%s", name, format, stdout)
			}
		}
	}
	_, stdout, _ := ravelWith("vips", "-o", "json", "--admin-socket", socket)
	var answer vipsAnswer
	if err := json.Unmarshal([]byte(stdout), &answer); err != nil || answer.Fleet.FrozenBy != "d1" || len(answer.Fleet.Drained) != 1 {
		t.Errorf("%v: %+v", err, answer.Fleet)
	}
	// members prints them, and peers has them in its answer.
	if _, stdout, _ := ravelWith("members", "--admin-socket", socket); !strings.Contains(stdout, "\nthe fleet is frozen by d1: changes have no effect\nr3 is drained by d1\n") {
		t.Errorf("members prints\n%s", stdout)
	}
}

// A drained director announces nothing, and that is as it should be.
func TestADrainedDirectorSaysWhyItAnnouncesNothing(t *testing.T) {
	r := newRig(t, ravel.Director)
	r.in.Agreed.Withdraw4, r.in.Agreed.Withdraw6 = true, true
	_ = r.set("drain/d1", "on")
	for _, v := range r.p.vips(r.n).VIPs {
		if v.Why != whyDrained || v.failed() {
			t.Errorf("%s: %q, failed %t", v.VIP, v.Why, v.failed())
		}
	}
	_ = r.set("drain/d1", "")
	for _, v := range r.p.vips(r.n).VIPs {
		if v.Why != whyWithdrawn || !v.failed() {
			t.Errorf("%s: %q, failed %t", v.VIP, v.Why, v.failed())
		}
	}
}

// What stands, and tables that differ, are warnings of check and no faults.
func TestCheckWarnsOfFreezeDrainAndDifferences(t *testing.T) {
	var lines []line
	for _, p := range []ravel.Problem{
		{Where: "fleet", What: "is frozen by d1: changes have no effect", Fix: "ravel freeze off"},
		{Where: "r3", What: "is drained by d1", Fix: "ravel drain --undo r3"},
		{Where: web.String(), What: "has another Maglev table than d2: open flows break when one of them is lost", Fix: "compare"},
	} {
		lines = append(lines, runningLines(checkAnswer{Role: "director", Problems: []ravel.Problem{p}})...)
	}
	if len(lines) != 3 {
		t.Fatalf("%+v", lines)
	}
	for _, l := range lines {
		if l.Status != check.Warn || l.Fix == "" {
			t.Errorf("%+v", l)
		}
	}
	// And they come through from the running process.
	r := newRig(t, ravel.Director)
	c, _ := r.p.computed.Latest()
	c.problems = []ravel.Problem{{Where: "fleet", What: "is frozen by d1: changes have no effect", Fix: "ravel freeze off"}}
	r.p.computed.Set(c)
	_, stdout, _ := ravelWith("check", "--admin-socket", r.socket())
	if want := "warn  fleet: is frozen by d1: changes have no effect\n      mend it by: ravel freeze off\n"; !strings.Contains(stdout, want) {
		t.Errorf("check prints\n%s", stdout)
	}
}

// Who announces nothing, or is not to attract packets, is nobody to leave it to.
func TestTheOnlyOneThatAttracts(t *testing.T) {
	up := map[netip.Addr]bool{netip.MustParseAddr("10.0.0.1"): true}
	for name, c := range map[string]struct {
		other ravel.Report
		sole  bool
	}{
		"the other attracts":                 {ravel.Report{Sessions: up}, false},
		"it attracts in one family":          {ravel.Report{Sessions: up, Withdrawn6: true}, false},
		"it announces nothing":               {ravel.Report{Sessions: up, Withdrawn4: true, Withdrawn6: true}, true},
		"it is dark":                         {ravel.Report{Sessions: up, Dark: true}, true},
		"it has no session that is up":       {ravel.Report{Sessions: map[netip.Addr]bool{netip.MustParseAddr("10.0.0.1"): false}}, true},
		"nothing is known of its sessions":   {ravel.Report{}, false},
		"and it is dark, without a session ": {ravel.Report{Dark: true}, true},
	} {
		f := ravel.Fleet{
			Settled: true, Members: []ravel.Member{{Name: "d1", State: ravel.Alive}, {Name: "d2", State: ravel.Alive}},
			Reports: map[string]ravel.Report{"d1": c.other, "d2": {Sessions: up}},
		}
		if got := soleAttractor("d2", desired.Inputs{}, f); got != c.sole {
			t.Errorf("%s: d2 is the only one: %t, want %t", name, got, c.sole)
		}
	}
}
