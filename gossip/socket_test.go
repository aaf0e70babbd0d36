package gossip

import (
	"net/netip"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
)

// Over real sockets of the loopback interface.
func TestSockets(t *testing.T) {
	for _, ip := range []string{"127.0.0.", "::1"} {
		t.Run(ip, func(t *testing.T) {
			w := &world{t: t, key: keyFile(t, NewKey())}
			var all []*process
			for n := range 3 {
				c := w.config(n+1, ravel.Director)
				c.Bind = netip.AddrPortFrom(netip.MustParseAddr("::1"), uint16(7000+n))
				if ip != "::1" {
					c.Bind = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, byte(1 + n)}), DefaultPort)
				}
				g, err := New(c)
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, w.run(g))
				w.seeds = []string{all[0].addr.String()}
			}
			for _, p := range all {
				until(t, "all settle", 5*time.Second, func() bool { return p.fleet().Settled && len(p.fleet().Members) == 3 })
			}
			var entries []ravel.RosterEntry
			for n := range 200 { // too big for a packet
				entries = append(entries, entry(n, uint64(n+1), ravel.Active))
			}
			all[2].Write(service(1), entries)
			for _, p := range all {
				took := until(t, "all hear of a roster", 2*time.Second, func() bool { return len(p.fleet().Rosters[service(1)]) == 200 })
				t.Logf("%s heard it after %s", p.config.Name, took)
			}
			all[1].stop()
			took := all[0].sees("d2", ravel.Dead, 2*time.Second)
			t.Logf("dead after %s, bound %s", took, Fast.DetectWithin(3))
		})
	}
}
