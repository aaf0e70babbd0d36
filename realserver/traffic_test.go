package realserver

import (
	"net/netip"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

// Pods see the client, the client sees the VIP, in both families and protocols.
func TestRedirect(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		l := newLab(t, 2)
		l.serve(8080)
		r := newReal(t, v, nil)
		var all []ravel.Redirect
		for _, vip := range []netip.Addr{vip4, vip6} {
			all = append(all, redirect(ravel.TCP, vip, 80, 0, 1), redirect(ravel.UDP, vip, 53, 0, 1))
		}
		apply(t, r, all...)
		for _, x := range all {
			pod, saw, own, err := ask(x.Key)
			if err != nil {
				t.Fatalf("%s: %v", x.Key, err)
			}
			if saw != own {
				t.Errorf("%s: %s saw %s, want the client's %s", x.Key, pod, saw, own)
			}
		}
	})
}
