package hold

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
)

// documents have VIPs of one service each, behind a pod on every node, and a director that peers.
func documents(vips, nodes int) Documents {
	var d Documents
	for i := range vips {
		d.Cluster.Services = append(d.Cluster.Services, service(i, "web"))
	}
	for i := range nodes {
		name := fmt.Sprintf("n%02d", i)
		d.Cluster.Nodes = append(d.Cluster.Nodes, desired.Node{
			Name: name, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i), 1})}, Labels: map[string]string{"lb": "yes"}, Ready: true,
		})
		d.Cluster.Endpoints = append(d.Cluster.Endpoints, endpoint(i, "web"))
	}
	d.Fleet.Directors = []desired.FleetDirector{{Name: "d1", Addrs: []netip.Addr{netip.MustParseAddr("10.9.0.1")}}}
	d.Fleet.Peers = []desired.FleetPeer{{Peer: ravel.Peer{Addr: netip.MustParseAddr("10.9.0.254")}}}
	return d
}

func service(i int, name string) desired.Service {
	return desired.Service{
		Key:       ravel.ServiceKey{VIP: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), Proto: ravel.TCP, Port: 80},
		Namespace: "shop", Service: name, PortName: "http", Scheduler: ravel.MH,
	}
}

func endpoint(node int, name string) desired.Endpoint {
	return desired.Endpoint{
		Namespace: "shop", Service: name, PortName: "http", Proto: ravel.TCP, Addr: netip.AddrFrom4([4]byte{10, 1, byte(node), 1}),
		Port: 8080, Node: fmt.Sprintf("n%02d", node), Ready: true,
	}
}

// edit returns a copy that was changed.
func (d Documents) edit(change func(*Documents)) Documents {
	d.Cluster.Services, d.Cluster.Nodes = slices.Clone(d.Cluster.Services), slices.Clone(d.Cluster.Nodes)
	d.Cluster.Endpoints, d.Fleet.Directors = slices.Clone(d.Cluster.Endpoints), slices.Clone(d.Fleet.Directors)
	change(&d)
	return d
}

func drop(n int) func(*Documents) {
	return func(d *Documents) { d.Cluster.Services = d.Cluster.Services[n:] }
}

func fence(key, value string) func(*Documents) {
	return func(d *Documents) { d.Cluster.Labels = map[string]string{key: value} }
}

func TestWhatIsHeld(t *testing.T) {
	emptied := func(d *Documents) { *d = Documents{Reported: d.Reported} }
	rename := func(d *Documents) {
		for i := range d.Cluster.Services {
			d.Cluster.Services[i].Service = "wbe"
		}
	}
	nodesGo := func(n int) func(*Documents) {
		return func(d *Documents) { d.Cluster.Nodes = d.Cluster.Nodes[n:] }
	}
	podsGo := func(n int) func(*Documents) {
		return func(d *Documents) { d.Cluster.Endpoints = d.Cluster.Endpoints[n:] }
	}
	all := func(change func(*desired.Node)) func(*Documents) {
		return func(d *Documents) {
			for i := range d.Cluster.Nodes {
				change(&d.Cluster.Nodes[i])
			}
		}
	}
	for _, test := range []struct {
		name             string
		vips, nodes      int
		change           func(*Documents)
		static, reported string // what is held
	}{
		{"half of the VIPs", 8, 4, drop(4), "", ""},
		{"more than half of the VIPs", 8, 4, drop(5), "5 of 8 VIPs (192.0.2.0, 192.0.2.1, 192.0.2.2 and 2 more)", "same"},
		{"two of three VIPs", 3, 4, drop(2), "", ""},
		{"three of four VIPs", 4, 4, drop(3), "3 of 4 VIPs (192.0.2.0, 192.0.2.1, 192.0.2.2)", "same"},
		{"the only VIP", 1, 1, drop(1), "all 1 VIPs (192.0.2.0), and all 1 real servers (n00)", "same"},
		{"an emptied file", 2, 3, emptied, "all 2 VIPs (192.0.2.0, 192.0.2.1), and all 3 real servers (n00, n01, n02)", "all 2 VIPs (192.0.2.0, 192.0.2.1)"},
		{"a fence that matches no node", 1, 4, fence("lb", "no"), "all 4 real servers (n00, n01, n02 and 1 more)", "same"},
		{"a fence that matches all", 1, 4, fence("lb", "yes"), "", ""},
		{"a service that nothing answers for", 2, 4, rename, "all 2 VIPs with endpoints (192.0.2.0, 192.0.2.1), and all 4 real servers (n00, n01, n02 and 1 more)", "same"},
		{"nodes that become directors", 1, 4, func(d *Documents) {
			for _, n := range d.Cluster.Nodes[:3] {
				d.Fleet.Directors = append(d.Fleet.Directors, desired.FleetDirector{Name: n.Name})
			}
		}, "3 of 4 real servers (n00, n01, n02)", "same"},
		{"no directors", 2, 4, func(d *Documents) { d.Fleet.Directors = nil }, "all 2 announced VIPs (192.0.2.0, 192.0.2.1)", "same"},
		{"the directors are nodes with a label", 2, 4, func(d *Documents) {
			d.Fleet.Directors, d.Fleet.DirectorNodes = nil, map[string]string{"director": ""}
		}, "", ""},
		{"nodes that become directors by a label", 1, 4, func(d *Documents) { d.Fleet.DirectorNodes = map[string]string{"lb": "yes"} },
			"all 4 real servers (n00, n01, n02 and 1 more)", "same"},
		{"no peers", 2, 4, func(d *Documents) { d.Fleet.Peers = nil }, "all 2 announced VIPs (192.0.2.0, 192.0.2.1)", "same"},
		{"nodes that are no more", 1, 8, nodesGo(5), "5 of 8 real servers (n00, n01, n02 and 2 more)", ""},
		{"nodes and pods that are no more", 1, 8, func(d *Documents) { nodesGo(5)(d); podsGo(5)(d) }, "5 of 8 real servers (n00, n01, n02 and 2 more)", ""},
		{"half of the nodes", 1, 8, nodesGo(4), "", ""},
		{"a scale-down to one pod", 1, 8, podsGo(7), "", ""},
		{"a scale-down to none", 1, 8, podsGo(8), "all 1 VIPs with endpoints (192.0.2.0)", ""},
		{"all nodes dead", 1, 8, all(func(n *desired.Node) { n.Ready = false }), "", ""},
		{"all pods not ready", 1, 8, func(d *Documents) {
			for i := range d.Cluster.Endpoints {
				d.Cluster.Endpoints[i].Ready = false
			}
		}, "", ""},
		{"nodes without the label", 1, 8, func(d *Documents) {
			fence("lb", "yes")(d)
			all(func(n *desired.Node) { n.Labels = nil })(d)
		}, "all 8 real servers (n00, n01, n02 and 5 more)", "same"},
		{"more VIPs", 1, 1, func(d *Documents) { d.Cluster.Services = append(d.Cluster.Services, service(9, "web")) }, "", ""},
		{"another scheduler", 8, 8, func(d *Documents) { d.Cluster.Services[0].Scheduler = "wlc" }, "", ""},
		{"other VIPs", 8, 8, func(d *Documents) {
			for i := range d.Cluster.Services {
				d.Cluster.Services[i] = service(100+i, "web")
			}
		}, "all 8 VIPs (192.0.2.0, 192.0.2.1, 192.0.2.2 and 5 more)", "same"},
	} {
		for _, reported := range []bool{false, true} {
			from := documents(test.vips, test.nodes)
			from.Reported = reported
			to := from.edit(test.change)
			want := test.static
			if reported && test.reported != "same" {
				want = test.reported
			}
			if got := (Change{Parts: Weigh(from, to, 50)}).Takes(); got != want {
				t.Errorf("%s, reported %t: held is %q, want %q", test.name, reported, got, want)
			}
			if got := Weigh(from, to, 100); got != nil {
				t.Errorf("%s, reported %t: switched off, and held is %v", test.name, reported, got)
			}
			if to.Name() == from.Name() && want != "" {
				t.Errorf("%s, reported %t: what is held has the name of what is in force", test.name, reported)
			}
		}
	}
}

// The names of VIPs in numbers, those of nodes as text.
func TestOrderOfNames(t *testing.T) {
	list := []string{"n10", "192.0.2.10", "2001:db8::1", "n2", "192.0.2.9"}
	slices.SortFunc(list, compareNames)
	if got := strings.Join(list, " "); got != "192.0.2.9 192.0.2.10 2001:db8::1 n10 n2" {
		t.Error(got)
	}
}

// The name is of what operators want: not of pods that come and go, nor of the order of anything.
func TestName(t *testing.T) {
	d := documents(4, 6)
	for _, reported := range []bool{false, true} {
		d.Reported = reported
		same := d.edit(func(d *Documents) {
			slices.Reverse(d.Cluster.Services)
			slices.Reverse(d.Cluster.Nodes)
			slices.Reverse(d.Cluster.Endpoints)
			d.Cluster.Nodes[0].Ready = false
			d.Cluster.Endpoints = d.Cluster.Endpoints[2:]
			d.Cluster.Services[0].Scheduler = "wlc"
		})
		if d.Name() != same.Name() {
			t.Errorf("reported %t: another name for the same", reported)
		}
		for name, change := range map[string]func(*Documents){
			"a VIP":       drop(1),
			"a fence":     fence("lb", "yes"),
			"directors":   func(d *Documents) { d.Fleet.Directors = nil },
			"a service":   func(d *Documents) { d.Cluster.Services[0].Service = "other" },
			"a node":      func(d *Documents) { d.Cluster.Nodes = d.Cluster.Nodes[1:] },
			"a label":     func(d *Documents) { d.Cluster.Nodes[0].Labels = nil },
			"all of pods": func(d *Documents) { d.Cluster.Endpoints = nil },
		} {
			seen := reported && (name == "a node" || name == "a label" || name == "all of pods")
			if other := d.edit(change).Name() != d.Name(); other == seen {
				t.Errorf("reported %t, %s: another name is %t", reported, name, other)
			}
		}
	}
}

// While a change is held, the nodes and pods that a cluster reports are followed; of pods that the new documents do not
// name, the last that was known stays.
func TestWhileHeldPodsAreFollowed(t *testing.T) {
	before := documents(4, 4)
	before.Reported = true
	before.Cluster.Services = append(before.Cluster.Services, service(9, "old"))
	before.Cluster.Endpoints = append(before.Cluster.Endpoints, endpoint(0, "old"))
	newest := before.edit(func(d *Documents) {
		d.Cluster.Services = d.Cluster.Services[:1]
		d.Cluster.Endpoints = []desired.Endpoint{endpoint(3, "web")} // a scale-down, and nothing of old
		d.Cluster.Nodes[1].Ready = false
		d.Fleet.Directors = nil
	})
	got := before.instead(newest)
	if len(got.Cluster.Services) != 5 || len(got.Fleet.Directors) != 1 || got.Cluster.Nodes[1].Ready {
		t.Errorf("in force are %+v", got)
	}
	if want := []desired.Endpoint{endpoint(3, "web"), endpoint(0, "old")}; !slices.Equal(got.Cluster.Endpoints, want) {
		t.Errorf("endpoints %+v", got.Cluster.Endpoints)
	}
	// Once more is told of old, that counts.
	newest.Cluster.Endpoints = []desired.Endpoint{endpoint(3, "web"), endpoint(2, "old")}
	if got := got.instead(newest); !slices.Equal(got.Cluster.Endpoints, newest.Cluster.Endpoints) {
		t.Errorf("endpoints %+v", got.Cluster.Endpoints)
	}
	// What an operator wrote as a whole stays as a whole.
	before.Reported, newest.Reported = false, false
	if !before.instead(newest).Same(before) {
		t.Error("a part of a held file is in force")
	}
}
