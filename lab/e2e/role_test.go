package e2e

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A host that changes its role has nothing left of the one before: no redirect that takes packets before IPVS sees them,
// no service of IPVS that takes those that no redirect wants.
func TestAHostChangesItsRole(t *testing.T) {
	s := fleet(t)
	const node = "r3"
	rules := func() string {
		return shell(t, s, node, "{ iptables-save; ip6tables-save; } | grep -E '^-A .*RAVEL' | grep -v RAVEL-GUARD || true")
	}
	services := func() string { return shell(t, s, node, "tail -n +4 /proc/net/ip_vs") }
	eventually(t, 30*time.Second, func() error {
		if !strings.Contains(rules(), "DNAT") {
			return fmt.Errorf("there are no redirects yet: %s", rules())
		}
		return nil
	})
	must(t, s.Process(node).Stop(within(t, 20*time.Second)))

	// Dark, because the document does not know it as a director.
	p, err := s.Fleet.Node(node).Spawn("other-role", slices.Concat([]string{filepath.Join("build", "ravel"), "director", "--node", node,
		"--gossip-insecure", "--fleet", "elsewhere", "--state-dir", "", "--attract", "none", "--settle", "1s"}, s.Source)...)
	must(t, err)
	t.Cleanup(func() {
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
	})
	eventually(t, 30*time.Second, func() error {
		if services() == "" {
			return fmt.Errorf("no service of IPVS yet")
		}
		return nil
	})
	for line := range strings.Lines(rules()) {
		if !strings.Contains(line, "RAVEL-UNTRACKED") {
			t.Errorf("as a director it has the rule %s", line)
		}
	}
	must(t, p.Stop(within(t, 20*time.Second)))

	must(t, s.Start(node))
	eventually(t, 30*time.Second, func() error { return s.Ready(t.Context(), node) })
	if left := services(); left != "" {
		t.Errorf("as a realserver it has the services\n%s", left)
	}
	if got := rules(); !strings.Contains(got, "DNAT") || strings.Contains(got, "RAVEL-UNTRACKED") {
		t.Errorf("as a realserver again it has the rules\n%s", got)
	}
}
