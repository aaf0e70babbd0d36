package desired

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestNodesWithTheLabelsAreDirectors(t *testing.T) {
	addrs := func(list ...string) (all []netip.Addr) {
		for _, s := range list {
			all = append(all, netip.MustParseAddr(s))
		}
		return all
	}
	listed := FleetDirector{Name: "outside", Addrs: addrs("10.0.0.9"), RouterID: netip.MustParseAddr("10.0.0.9")}
	label := map[string]string{"ravel.dev/director": "", "rack": "a"}
	want := map[string]string{"ravel.dev/director": ""}
	tests := []struct {
		name  string
		fleet Fleet
		nodes []Node
		want  []FleetDirector
	}{
		{"no label asked for", Fleet{Directors: []FleetDirector{listed}}, []Node{{Name: "n", Addrs: addrs("10.0.0.1"), Labels: label}}, []FleetDirector{listed}},
		{"the first of each family, by name", Fleet{Directors: []FleetDirector{listed}, DirectorNodes: want}, []Node{
			{Name: "n2", Addrs: addrs("fd00::2", "10.0.0.2", "10.0.1.2"), Labels: label},
			{Name: "n1", Addrs: addrs("10.0.0.1"), Labels: label},
			{Name: "n3", Addrs: addrs("10.0.0.3"), Labels: map[string]string{"ravel.dev/director": "no"}},
			{Name: "n4", Addrs: addrs("10.0.0.4")},
		}, []FleetDirector{listed, {Name: "n1", Addrs: addrs("10.0.0.1"), Labels: label}, {Name: "n2", Addrs: addrs("10.0.0.2", "fd00::2"), Labels: label}}},
		{"the list counts first", Fleet{Directors: []FleetDirector{listed}, DirectorNodes: want}, []Node{
			{Name: "outside", Addrs: addrs("10.0.0.7"), Labels: label},
			{Name: "again", Addrs: addrs("10.0.0.9"), Labels: label},
			{Name: "nowhere", Labels: label},
		}, []FleetDirector{listed}},
		{"two nodes, one address", Fleet{DirectorNodes: want}, []Node{
			{Name: "b", Addrs: addrs("10.0.0.1"), Labels: label}, {Name: "a", Addrs: addrs("10.0.0.1"), Labels: label},
		}, []FleetDirector{{Name: "a", Addrs: addrs("10.0.0.1"), Labels: label}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before := len(test.fleet.Directors)
			got := test.fleet.WithNodes(test.nodes)
			if d := cmp.Diff(test.want, got.Directors, cmpopts.EquateComparable(netip.Addr{})); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
			if again := got.WithNodes(test.nodes); len(again.Directors) != len(got.Directors) {
				t.Errorf("once more adds: %v", again.Directors)
			}
			if len(test.fleet.Directors) != before {
				t.Error("the fleet was changed")
			}
		})
	}
}
