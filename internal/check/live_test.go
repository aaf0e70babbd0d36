package check

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// before is all of the machine that a careless look could change.
func picture(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("bash", "-c", `cat /proc/modules; ip -d -o link; ip -o addr; ip route show table all; ip -6 route show table all
		cat /proc/net/ip_tables_names /proc/net/ip6_tables_names /proc/net/ip_tables_matches /proc/net/ip_tables_targets
		ls /proc/net; find /proc/sys/net | sort
		for t in $(cat /proc/net/ip_tables_names); do iptables-legacy-save -t $t | grep -v '^#'; done
		test -e /proc/net/ip_vs && cat /proc/net/ip_vs
		ls -R /run; true`).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// find returns the lines of one name.
func find(lines []Line, name string) []Line {
	var found []Line
	for _, l := range lines {
		if l.Name == name {
			found = append(found, l)
		}
	}
	return found
}

// wellFormed checks what holds for all lines.
func wellFormed(t *testing.T, lines []Line) {
	t.Helper()
	names := strings.Join(Names(), " ")
	for _, l := range lines {
		switch l.Status {
		case OK, Warn, Fail:
		default:
			t.Errorf("status %q: %v", l.Status, l)
		}
		if l.Status != OK && l.Fix == "" {
			t.Errorf("no fix: %v", l)
		}
		if l.Detail == "" || !strings.Contains(" "+names+" ", " "+l.Name+" ") {
			t.Errorf("no detail, or no known name: %v", l)
		}
		if strings.ContainsAny(l.Detail+l.Fix, "\n\x1b") {
			t.Errorf("more than a line: %q", l)
		}
		if strings.Contains(l.Detail, "the check itself broke") {
			t.Errorf("a check broke: %v", l)
		}
	}
}

func TestLookingChangesNothing(t *testing.T) {
	nettest.Need(t, nettest.Root)
	was := picture(t)
	for _, role := range []string{"", "director", "realserver"} {
		h := Host{
			Role: role, Tunnel: true, VIPs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
			Nodes: []netip.Addr{netip.MustParseAddr("198.51.100.1")}, Listen: []netip.AddrPort{netip.MustParseAddrPort("[::]:179")},
			Socket: "/run/ravel/ravel.sock",
		}
		lines := h.Run(t.Context())
		wellFormed(t, lines)
		for _, l := range lines {
			t.Log(l)
		}
		if len(lines) < 20 {
			t.Errorf("role %q: only %d lines", role, len(lines))
		}
	}
	if diff := cmp.Diff(was, picture(t)); diff != "" {
		t.Errorf("Run changed something (-before +after):\n%s", diff)
	}
}
