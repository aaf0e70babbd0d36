package e2e

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel/lab/stage"
)

// lookScript prints all that ravel could touch on a host, a fact a line; with an argument, the sysctls too.
const lookScript = `
echo "== links"; ip -details -oneline link
echo "== addresses"; ip -oneline address
for family in -4 -6; do echo "== routes $family"; ip $family route show table all; ip $family rule; done
for save in iptables-save ip6tables-save; do echo "== $save"; $save; done
echo "== ipset"; ipset save
echo "== ipvs"; ipvsadm -Sn
if [ $# -gt 0 ]; then grep -rs . /proc/sys/net/ipv4 /proc/sys/net/ipv6 || true; fi`

// What makes a line ours. RAVEL and RAVEL-SVC-… are ours, RAVELLO is not; neither is another's service on a VIP.
var (
	ours     = regexp.MustCompile(`\bRAVEL\b|\bproto 82\b|\bravel0\b|\b198\.51\.100\.2\d\b|\b2001:db8:77::2\d\b`)
	counters = regexp.MustCompile(`\[\d+:\d+\]`)
)

func everything(string) bool { return true }

// hostState returns what the kernel of a node holds: of it, the lines that keep says. Rules that come and go by the
// hand of the test's other writer are not in it.
func hostState(t *testing.T, s *stage.Stage, node string, keep func(line string) bool) string {
	t.Helper()
	script := []string{"bash", "-c", lookScript, "-"}
	if keep("/proc/sys/net/ipv4/vs/conntrack:0") {
		script = append(script, "sysctls")
	}
	var b strings.Builder
	for line := range strings.Lines(on(t, s, node, script...)) {
		// A route that expires is one that the kernel learned by itself.
		if strings.HasPrefix(line, "#") || strings.Contains(line, " expires ") || strings.Contains(line, "churn") || strings.Contains(line, "grown") || !keep(line) {
			continue
		}
		b.WriteString(counters.ReplaceAllString(line, "[]"))
	}
	return b.String()
}

// diff returns the lines that only one of two states has.
func diff(before, after string) string {
	var out []string
	had, has := strings.Split(before, "\n"), strings.Split(after, "\n")
	for _, line := range had {
		if !slices.Contains(has, line) {
			out = append(out, "- "+line)
		}
	}
	for _, line := range has {
		if !slices.Contains(had, line) {
			out = append(out, "+ "+line)
		}
	}
	if len(out) == 0 {
		out = append(out, fmt.Sprintf("the same lines in another order, or another number of times:\n%s\nand now\n%s", before, after))
	}
	return strings.Join(out, "\n")
}
