package main

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/check"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/node"
)

// Without --node a check looks as this host would, as a role does; a document for other hosts is no fault.
func TestCheckLooksAsThisHost(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile("../../deploy/example/ravel-static.yaml")
	if err != nil {
		t.Fatal(err)
	}
	replaced := func(old, new string) string {
		if !strings.Contains(string(example), "name: "+old) {
			t.Fatalf("no %s in the example", old)
		}
		return write(t, "static.yaml", strings.ReplaceAll(string(example), old, new))
	}
	nobody := filepath.Join(t.TempDir(), "admin.sock")
	for _, test := range []struct {
		name, file string
		args       []string
		code       int
		says       string
	}{
		{"a director", replaced("director1", host), nil, exitOK, "; looked at as the director " + host},
		{"a node", replaced("node2", host), nil, exitOK, "; looked at as the realserver " + host},
		{"neither", replaced("node2", "n-other"), nil, exitOK, "this host, " + host + ", is neither director nor node there"},
		{"neither, in a role", replaced("node2", "n-other"), []string{"--role", "director"}, exitOK, "is neither director nor node there"},
		{"another by name", replaced("node2", "n-other"), []string{"--node", "n-other"}, exitOK, "; looked at as the realserver n-other"},
		{"nobody by name", replaced("node2", "n-other"), []string{"--node", host}, exitFault, "fail  fleet.directors: "},
	} {
		code, stdout, stderr := ravelWith(append([]string{"check", "--admin-socket", nobody, "--static", test.file}, test.args...)...)
		if code != test.code || !strings.Contains(stdout, test.says) || strings.Count(stdout, "warn") > 1 {
			t.Errorf("%s: exit code %d, want %d and %q:\n%s%s", test.name, code, test.code, test.says, stdout, stderr)
		}
	}
}

// What vips shows of a VIP that is not as it should be is a failure of check; what only waits for real servers is none.
func TestCheckFailsWhereAWantedVIPIsNotAnnounced(t *testing.T) {
	vip, addr := netip.MustParseAddr("192.0.2.80"), netip.MustParseAddr("192.0.2.11")
	key := ravel.ServiceKey{VIP: vip, Port: 80, Proto: ravel.TCP}
	serving := []ravel.VirtualService{{Key: key, RealServers: []ravel.RealServer{{Addr: addr, Weight: 1}}}}
	fleet := desired.Fleet{Directors: []desired.FleetDirector{{Name: "d1", Addrs: []netip.Addr{addr}}}}
	six := desired.Fleet{Directors: []desired.FleetDirector{{Name: "d1", Addrs: []netip.Addr{netip.MustParseAddr("2001:db8::1")}}}}
	routes := []ravel.Route{{Prefix: netip.PrefixFrom(vip, 32)}}
	director := func(fleet desired.Fleet, none bool, services []ravel.VirtualService, routes []ravel.Route) computed {
		return computed{inputs: desired.Inputs{Node: "d1", Fleet: fleet, AttractNone: none}, state: ravel.State{Services: services, Routes: routes}}
	}
	wanted := vipStatus{VIP: vip, Wanted: true, Serving: 1}
	rising, announced, gone := wanted, wanted, wanted
	rising.Serving, announced.Announced, gone.Wanted = 0, true, false
	for _, test := range []struct {
		name   string
		role   ravel.Role
		v      vipStatus
		c      computed
		report node.Report
		want   string // the line, or nothing
	}{
		{"announced", ravel.Director, announced, director(fleet, false, serving, routes), node.Report{}, ""},
		{"lingers", ravel.Director, gone, director(fleet, false, nil, nil), node.Report{}, ""},
		{"attracts nothing", ravel.Director, wanted, director(fleet, true, serving, nil), node.Report{Err: errors.New("EBUSY")}, ""},
		{"no real server", ravel.Director, wanted, director(fleet, false, nil, nil), node.Report{}, ""},
		{"not every service", ravel.Director, wanted, director(fleet, false, serving, nil), node.Report{}, ""},
		{"rising", ravel.Director, rising, director(fleet, false, serving, routes), node.Report{}, ""},
		{"misnamed", ravel.Director, wanted, director(desired.Fleet{}, false, serving, nil), node.Report{},
			"is not announced: this director is not in fleet.directors"},
		{"no next hop", ravel.Director, wanted, director(six, false, serving, nil), node.Report{},
			"is not announced: this director has no next hop for it"},
		{"a walk failed", ravel.Director, wanted, director(fleet, false, serving, routes), node.Report{Err: errors.New("EBUSY")},
			"is not announced: the last walk through the appliers did not end well"},
		{"walked, and yet", ravel.Director, wanted, director(fleet, false, serving, routes), node.Report{Effective: ravel.State{Routes: routes}},
			"is not announced: a problem of this host or of BGP keeps it from that"},
		{"not walked", ravel.Director, wanted, director(fleet, false, serving, routes), node.Report{}, "is not announced: comes with the next walk"},
		{"not held", ravel.Realserver, wanted, computed{}, node.Report{}, "is not held: a problem keeps its redirect from work"},
	} {
		p := &process{role: test.role}
		test.v.Why = p.why(test.v, len(test.c.state.Routes) > 0, test.c, test.report)
		if test.v.failed() != (test.want != "") {
			t.Errorf("%s: %q fails: %v", test.name, test.v.Why, test.v.failed())
		}
		if test.want == "" {
			continue
		}
		lines := runningLines(checkAnswer{Role: test.role.String(), VIPs: []vipStatus{test.v}})
		if len(lines) != 1 || lines[0].Status != check.Fail || lines[0].Name != "VIP 192.0.2.80" || lines[0].Detail != test.want {
			t.Errorf("%s: %+v", test.name, lines)
		}
	}
}
