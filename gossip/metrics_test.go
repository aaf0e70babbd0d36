package gossip

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/ravel-lb/ravel"
)

// All roles and states are there, also those of no member.
func TestMembersOfNoStateAreZero(t *testing.T) {
	w := &world{t: t, insecure: true}
	c := w.config(1, ravel.Director)
	registry := prometheus.NewPedanticRegistry()
	c.KeyFile, c.Registerer = "", registry
	if _, err := New(c); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "ravel_gossip_members" {
			if n := len(f.GetMetric()); n != 10 {
				t.Errorf("%d pairs of role and state", n)
			}
			return
		}
	}
	t.Error("no ravel_gossip_members")
}
