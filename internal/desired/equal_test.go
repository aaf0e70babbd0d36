package desired

import (
	"testing"

	"github.com/ravel-lb/ravel"
)

// Equal weights are for who takes new flows: a node whose pods all go keeps weight 0, and its one slot's worth.
func TestEqualWeights(t *testing.T) {
	for name, test := range map[string]struct {
		scheduler ravel.Scheduler
		change    func(*Inputs)
		want      string
	}{
		"two pods and one": {ravel.MH, func(*Inputs) {}, "" +
			"  -> 10.0.0.11 weight 1 last 1 auto\n  -> 10.0.0.12 weight 1 last 1 auto\n"},
		"another scheduler": {"wrr", func(*Inputs) {}, "" +
			"  -> 10.0.0.11 weight 1 last 1 auto\n  -> 10.0.0.12 weight 1 last 1 auto\n"},
		"all of a node's pods go": {ravel.MH, func(in *Inputs) {
			in.Cluster.Endpoints[0].Terminating, in.Cluster.Endpoints[1].Terminating = true, true
		}, "  -> 10.0.0.11 weight 0 last 1 auto\n  -> 10.0.0.12 weight 1 last 1 auto\n"},
		"a node is not ready": {ravel.MH, func(in *Inputs) { in.Cluster.Nodes[0].Ready = false }, "" +
			"  -> 10.0.0.11 weight 0 last 1 auto\n  -> 10.0.0.12 weight 1 last 1 auto\n"},
	} {
		t.Run(name, func(t *testing.T) {
			in := small()
			in.EqualWeights = true
			in.Cluster.Services = in.Cluster.Services[:1]
			in.Cluster.Services[0].Scheduler = test.scheduler
			test.change(&in)
			state, _ := Compute(in)
			state.Addrs, state.Routes, state.Peers = nil, nil, nil
			want := "service tcp 192.0.2.20:80 " + string(test.scheduler) + "\n" + test.want
			if got := text(state); got != want {
				t.Errorf("got:\n%swant:\n%s", got, want)
			}
		})
	}
}
