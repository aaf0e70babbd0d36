package realserver

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

// load restores a recorded rule set of both families over what there is.
func load(t *testing.T, v iptables.Variant, name string) {
	t.Helper()
	for command, ext := range map[string]string{"iptables": ".v4", "ip6tables": ".v6"} {
		f, err := os.Open("testdata/" + name + ext)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd := exec.Command(command + "-" + string(v) + "-restore")
		cmd.Stdin = f
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
	}
}

// Beside what kube-proxy and Calico write, with FORWARD's policy DROP, our traffic passes and their rules stay as they
// were, to the byte.
func TestBesideOthers(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		for _, other := range []string{"kube-proxy", "calico"} {
			t.Run(other, func(t *testing.T) {
				flush(t, v)
				l := newLab(t, 2)
				l.serve(8080)
				load(t, v, other)
				before := saved(t, v)
				if !strings.Contains(before, ":FORWARD DROP") {
					t.Fatalf("the rules of %s are not loaded:\n%s", other, before)
				}
				for _, masquerade := range []bool{false, true} {
					r := newReal(t, v, nil)
					all := everyKind(0)
					for i := range all {
						all[i].Masquerade = masquerade
					}
					apply(t, r, all...)
					flushFlows(t)
					for _, x := range all {
						c, err := dial(x.Key)
						if err != nil {
							t.Fatalf("%s, masquerade %t: %v", x.Key, masquerade, err)
						}
						defer c.Close()
						pod, saw, err := askOn(c)
						if err != nil || pod != podNS(0) {
							t.Errorf("%s, masquerade %t: %q answers, %v", x.Key, masquerade, pod, err)
						}
						if own := c.LocalAddr().String(); (saw.String() == own) == masquerade {
							t.Errorf("%s, masquerade %t: %s saw %s, the client is %s", x.Key, masquerade, pod, saw, own)
						}
						if x.Key.Proto == ravel.TCP {
							if err := echo(c, strings.Repeat("0123456789", 1000)); err != nil {
								t.Errorf("%s, masquerade %t: %v", x.Key, masquerade, err)
							}
						}
					}
					// What is not ours is still refused by them.
					stopped(t, v, pod(0, vip4), "icmp", func() {
						if out, err := exec.Command("ip", "netns", "exec", "client", "ping", "-c1", "-W1", "10.2.1.2").CombinedOutput(); err == nil {
							t.Errorf("the others' policy no longer holds:\n%s", out)
						}
					})
					var others strings.Builder
					for line := range strings.Lines(saved(t, v)) {
						if !strings.Contains(line, "RAVEL") {
							others.WriteString(line)
						}
					}
					if others.String() != before {
						t.Errorf("their rules are now\n%s\nwant\n%s", others.String(), before)
					}
					if _, err := r.Cleanup(t.Context(), false); err != nil {
						t.Fatal(err)
					}
					if after := saved(t, v); after != before {
						t.Errorf("cleanup left\n%s\nwant\n%s", after, before)
					}
				}
			})
		}
	})
}
