package realserver

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

// Why redirects lead to pods and never to the chain that kube-proxy keeps for a Service: one jump to it from a chain of
// somebody else keeps kube-proxy from deleting it, and as it deletes in the one transaction that makes everything new
// (pkg/proxy/iptables/proxier.go, syncProxyRules), this node gets no change of any Service until the jump goes. A chain
// goes with the last pod, or the last one on the node, so that every such end would be a race with kube-proxy. Beside
// redirects as we make them the same transaction goes through.
func TestAJumpToAForeignChainBlocksItsOwner(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		r := newReal(t, v, nil)
		apply(t, r, redirect(ravel.TCP, vip4, 80, 0), redirect(ravel.TCP, vip6, 80, 0))
		for command, pods := range map[string][2]string{
			"iptables": {"10.2.1.2:8080", "10.2.2.2:8080"}, "ip6tables": {"[fd02:1::2]:8080", "[fd02:2::2]:8080"},
		} {
			program := command + "-" + string(v)
			// Of two Services, the first loses its last pod and the second gets one.
			sync := func(before bool) (string, error) {
				text := "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]\n"
				if before {
					text += "-A KUBE-SERVICES -p tcp -m tcp --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA\n" +
						"-A KUBE-SVC-AAAAAAAAAAAAAAAA -p tcp -j DNAT --to-destination " + pods[0] + "\n"
				} else {
					text += ":KUBE-SVC-BBBBBBBBBBBBBBBB - [0:0]\n" +
						"-A KUBE-SERVICES -p tcp -m tcp --dport 81 -j KUBE-SVC-BBBBBBBBBBBBBBBB\n" +
						"-A KUBE-SVC-BBBBBBBBBBBBBBBB -p tcp -j DNAT --to-destination " + pods[1] + "\n" +
						"-X KUBE-SVC-AAAAAAAAAAAAAAAA\n"
				}
				cmd := exec.Command(program+"-restore", "-w", "5", "--noflush", "--counters")
				cmd.Stdin = strings.NewReader(text + "COMMIT\n")
				out, err := cmd.CombinedOutput()
				return string(out), err
			}
			rules := func() string {
				out, err := exec.Command(program, "-t", "nat", "-S", "KUBE-SERVICES").CombinedOutput()
				return fmt.Sprintf("%s%v", out, err)
			}
			if out, err := sync(true); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			stuck := rules()
			jump := []string{"-w", "5", "-t", "nat", "-A", "RAVEL-REST", "-p", "tcp", "-j", "KUBE-SVC-AAAAAAAAAAAAAAAA"}
			if out, err := exec.Command(program, jump...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if out, err := sync(false); err == nil || rules() != stuck {
				t.Fatalf("with our jump kube-proxy's transaction went through, and redirects might lead to its chains: %s%s", out, rules())
			}
			r.Resync() // and the jump goes
			apply(t, r, redirect(ravel.TCP, vip4, 80, 0), redirect(ravel.TCP, vip6, 80, 0))
			if out, err := sync(false); err != nil || rules() == stuck {
				t.Fatalf("beside our redirects kube-proxy's transaction fails: %v: %s%s", err, out, rules())
			}
		}
	})
}
