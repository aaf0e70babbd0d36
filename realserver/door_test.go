package realserver

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// A port that another program publishes on all addresses of the host is not published on a VIP: the packet ends at the
// node, as one that nobody redirects. The host's own addresses and what pods of the cluster send are left to it.
func TestVIPIsNoDoor(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		l := newLab(t, 2)
		l.serve(8080)
		hold := "ip addr %[1]s 192.0.2.1/32 dev lo; ip addr %[1]s 2001:db8::1/128 dev lo"
		nettest.Shell(t, strings.ReplaceAll(hold, "%[1]s", "add"))
		t.Cleanup(func() { nettest.Shell(t, strings.ReplaceAll(hold, "%[1]s", "del")) })
		doors := map[bool]string{true: "10.2.2.2:8080", false: "[fd02:2::2]:8080"}
		door := func(op string) {
			for command, to := range map[string]string{"iptables": doors[true], "ip6tables": doors[false]} {
				nettest.Shell(t, command+"-"+string(v)+" -t nat "+op+" PREROUTING -m addrtype --dst-type LOCAL -p tcp --dport 8080 -j DNAT --to-destination "+to)
			}
		}
		// The pods and the client each ask from their own namespace.
		reached := func(from string, addr netip.Addr) (pod string, err error) {
			c, err := dialFrom(from, ravel.ServiceKey{VIP: addr, Proto: ravel.TCP, Port: 8080}, patience)
			if err != nil {
				return "", err
			}
			defer c.Close()
			pod, _, err = askOn(c)
			return pod, err
		}
		all := everyKind(0)
		exempt := func(o *Options) {
			o.NoMasquerade = []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16"), netip.MustParsePrefix("fd02::/16")}
		}
		for _, op := range []string{"-A", "-I"} {
			door(op)
			for _, vip := range []netip.Addr{vip4, vip6} {
				if pod, err := reached(clientNS, vip); pod != podNS(1) {
					t.Fatalf("%s: the door is not open before: %q, %v", vip, pod, err)
				}
			}
			r := newReal(t, v, exempt)
			apply(t, r, all...)
			flushFlows(t)
			for _, x := range all {
				if pod, _, _, err := ask(x.Key); pod != podNS(0) {
					t.Errorf("%s of %s: %q, %v", op, x.Key, pod, err)
				}
			}
			for vip, own := range map[netip.Addr]string{vip4: "10.1.0.1", vip6: "fd01::1"} {
				if pod, err := reached(clientNS, vip); err == nil || !strings.Contains(err.Error(), "refused") {
					t.Errorf("%s: a client at %s is not refused but reaches %q: %v", op, vip, pod, err)
				}
				if pod, err := reached(clientNS, netip.MustParseAddr(own)); pod != podNS(1) {
					t.Errorf("%s: a client at the node's own address: %q, %v", op, pod, err)
				}
				if pod, err := reached(podNS(0), vip); pod != podNS(1) {
					t.Errorf("%s: a pod at %s: %q, %v", op, vip, pod, err)
				}
			}
			before := saved(t, v)
			r.Resync()
			apply(t, r, all...)
			if after := saved(t, v); after != before {
				t.Errorf("%s: a resync changed the rules from\n%s\nto\n%s", op, before, after)
			}
			// A VIP without redirects is the host's.
			apply(t, r)
			flushFlows(t)
			if pod, err := reached(clientNS, vip4); pod != podNS(1) {
				t.Errorf("%s: with no redirect: %q, %v", op, pod, err)
			}
			if _, err := r.Cleanup(t.Context(), false); err != nil {
				t.Fatal(err)
			}
			door("-D")
		}
	})
}
