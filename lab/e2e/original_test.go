package e2e

import (
	"strings"
	"testing"
	"time"
)

// asTheOriginal turns what Ravel holds on a node into what the original Ravel would have left there: its chains in nat in
// the place of Ravel's, a dummy link for each VIP, IPVS services without a mark.
const asTheOriginal = `
turn() {
	$1-save -t nat >/run/nat
	{
		echo '*nat'
		grep -oE '^:RAVEL[^ ]*' /run/nat | sed 's/$/ - [0:0]/'
		echo ':RAVEL-MASQ - [0:0]'
		echo ':RAVEL-SVC-CDGGSHYLG3RE2FKL - [0:0]'
		echo "-A RAVEL -d $2 -p tcp -m tcp --dport 80 -m comment --comment default/web:http -j RAVEL-SVC-CDGGSHYLG3RE2FKL"
		pods=$(sed -n 's/.*-p tcp .*-j DNAT --to-destination //p' /run/nat | sort -u)
		left=$(echo "$pods" | wc -w)
		for pod in $pods; do
			chain=RAVEL-SEP-4ZIGKUTDV76XFVI$((left + 1))
			echo ":$chain - [0:0]"
			some=
			[ $left = 1 ] || some="-m statistic --mode random --probability $(awk "BEGIN {print 1/$left}")"
			echo "-A RAVEL-SVC-CDGGSHYLG3RE2FKL -m comment --comment default/web:http $some -j $chain"
			echo "-A $chain -p tcp -m comment --comment default/web:http -m tcp -j DNAT --to-destination $pod"
			left=$((left - 1))
		done
		echo "-A RAVEL-MASQ -j MARK --set-xmark 0x4000/0x4000"
		grep -oE '^:RAVEL-(VIP|REST|POST|SVC)[^ ]*' /run/nat | sed 's/^:/-X /'
		echo COMMIT
	} >/run/original
	$1-restore -w --noflush </run/original
}
[ "$1" != realserver ] || { turn iptables 198.51.100.20; turn ip6tables 2001:db8:77::20; }
ip link add 198_51_100_20 type dummy
ip address add 198.51.100.20 dev 198_51_100_20
ip link set 198_51_100_20 up
ip link add 000000000000020 type dummy
ip link set 000000000000020 up
ip -6 address add 2001:db8:77::20 dev 000000000000020 nodad
ip link del ravel0
# An edit takes the mark away by which Ravel knows its own.
[ "$1" != director ] || ipvsadm -Sn | sed -n 's/^-A/-E/p' | while read -r line; do ipvsadm $line; done
`

// What the original left on a host is taken over in place, a node's and a director's, and then removed; no request fails.
func TestTakingOverFromTheOriginal(t *testing.T) {
	s := fleet(t)
	ready(t, s)
	for _, test := range []struct {
		node, role string
		args       []string
		removed    int // lines of cleanup --original: links; chains and jumps
	}{
		{"r1", "realserver", nil, 2 + 2*2},
		{"d1", "director", []string{"--adopt"}, 2},
	} {
		must(t, s.Process(test.node).Kill())
		on(t, s, test.node, "bash", "-euc", asTheOriginal, "bash", test.role)
		load := startLoad(t, s)

		must(t, s.Start(test.node, test.args...))
		t.Cleanup(func() {
			if len(test.args) > 0 && running(s, test.node) {
				must(t, s.Process(test.node).Stop(within(t, 20*time.Second)))
			}
		})
		awaitApplied(t, s, test.node)
		load.unbroken(t, test.node+" has taken over")
		if test.role == "director" {
			if out := ravelSays(t, s, test.node, 0, "services"); strings.Contains(out, " other ") {
				t.Errorf("%s has not taken over:\n%s", test.node, out)
			}
		}

		out := ravelSays(t, s, test.node, 0, "cleanup", "--original")
		if n := strings.Count(out, "ip link delete ") + strings.Count(out, "-X RAVEL-S"); n < test.removed {
			t.Errorf("%s: %d of %d things are named:\n%s", test.node, n, test.removed, out)
		}
		if strings.Count(out, "ravel0 holds it too") != 2 {
			t.Errorf("%s: VIPs that nobody else holds:\n%s", test.node, out)
		}
		load.unbroken(t, test.node+" has nothing of the original's any more")
		awaitApplied(t, s, test.node)
		state := shell(t, s, test.node, "ip -o link; iptables-save -t nat; ip6tables-save -t nat")
		for _, gone := range []string{"198_51_100_20", "000000000000020", "CDGGSHYLG3RE2FKL", "RAVEL-SEP"} {
			if strings.Contains(state, gone) {
				t.Errorf("%s: %s is left:\n%s", test.node, gone, state)
			}
		}
		if again := ravelSays(t, s, test.node, 0, "cleanup", "--original"); !strings.Contains(again, "nothing of the original's is here") {
			t.Errorf("%s: again:\n%s", test.node, again)
		}
		load.stop(t)
	}
}
