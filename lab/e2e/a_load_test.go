package e2e

import (
	"net/netip"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/lab/stage"
	"github.com/ravel-lb/ravel/lab/traffic"
)

// loadOn begins requests from both clients to port 80 of each VIP, at a rate for each client and VIP.
func loadOn(t *testing.T, s *stage.Stage, name string, vips []netip.Addr, rate float64) []*stage.Client {
	t.Helper()
	var load traffic.Load
	for _, vip := range vips {
		load.Requests = append(load.Requests, traffic.Requests{Name: vip.String(), Target: netip.AddrPortFrom(vip, 80), Rate: rate})
	}
	var clients []*stage.Client
	for _, node := range []string{"c1", "c2"} {
		c, err := s.StartClient(within(t, 20*time.Second), node, name, load)
		must(t, err)
		t.Cleanup(func() {
			if err := c.Stop(); err != nil {
				t.Error(err)
			}
		})
		clients = append(clients, c)
	}
	return clients
}
