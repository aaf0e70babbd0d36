package desired

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/roster"
)

var addrs = cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{})

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func tcp(vip string, port uint16) ravel.ServiceKey {
	return ravel.ServiceKey{VIP: ip(vip), Proto: ravel.TCP, Port: port}
}

// small is a fleet of two directors and three nodes with two services.
func small() Inputs {
	service := func(key ravel.ServiceKey, name string) Service {
		return Service{Key: key, Namespace: "shop", Service: name, PortName: "http", Scheduler: ravel.MH,
			Flags: ravel.HashPort | ravel.Fallback, Where: "cluster.config." + key.String()}
	}
	endpoint := func(service, node, addr string) Endpoint {
		return Endpoint{Namespace: "shop", Service: service, PortName: "http", Proto: ravel.TCP, Addr: ip(addr), Port: 8080,
			Node: node, Ready: true}
	}
	return Inputs{
		Node: "d1",
		Cluster: Cluster{
			Services: []Service{service(tcp("192.0.2.20", 80), "web"), service(tcp("2001:db8::20", 80), "web")},
			Nodes: []Node{
				{Name: "r1", Addrs: []netip.Addr{ip("10.0.0.11"), ip("fd00::11")}, Ready: true},
				{Name: "r2", Addrs: []netip.Addr{ip("10.0.0.12"), ip("fd00::12")}, Ready: true},
				{Name: "r3", Addrs: []netip.Addr{ip("10.0.0.13")}, Ready: true},
			},
			Endpoints: []Endpoint{
				endpoint("web", "r1", "10.1.1.1"), endpoint("web", "r1", "10.1.1.2"), endpoint("web", "r2", "10.1.2.1"),
				endpoint("web", "r1", "fd01::1"),
			},
		},
		Fleet: Fleet{
			ASN: 65100,
			Directors: []FleetDirector{
				{Name: "d1", Addrs: []netip.Addr{ip("10.0.0.1"), ip("fd00::1")}, Labels: map[string]string{"rack": "a"}},
				{Name: "d2", Addrs: []netip.Addr{ip("10.0.0.2"), ip("fd00::2")}, Labels: map[string]string{"rack": "b"}},
			},
			Peers: []FleetPeer{
				{Peer: ravel.Peer{Addr: ip("10.0.0.254"), Port: 179, ASN: 65001}},
				{Peer: ravel.Peer{Addr: ip("10.0.0.253"), Port: 179, ASN: 65002}, Directors: []string{"d2"}},
				{Peer: ravel.Peer{Addr: ip("10.0.0.252"), Port: 179, ASN: 65003}, Labels: map[string]string{"rack": "a"}},
			},
			Policy: Policy{Communities: []ravel.Community{65100<<16 | 1}},
		},
	}
}

// text writes a state the way people read one, a fact a line.
func text(s ravel.State) string {
	var b strings.Builder
	for _, v := range s.Services {
		fmt.Fprintf(&b, "service %s %s\n", v.Key, v.Scheduler)
		for _, rs := range v.RealServers {
			fmt.Fprintf(&b, "  -> %s weight %d last %d %s\n", rs.Addr, rs.Weight, rs.LastWeight, rs.Forwarding)
		}
	}
	for _, r := range s.Redirects {
		fmt.Fprintf(&b, "redirect %s to %v\n", r.Key, r.Pods)
	}
	for _, a := range s.Addrs {
		fmt.Fprintf(&b, "addr %s\n", a.VIP)
	}
	for _, p := range s.Peers {
		fmt.Fprintf(&b, "peer %s as %d from %d\n", p.Addr, p.ASN, p.LocalASN)
	}
	for _, r := range s.Routes {
		fmt.Fprintf(&b, "route %s via %s %v", r.Prefix, r.NextHop, r.Communities)
		if len(r.ASPath) > 0 {
			fmt.Fprintf(&b, " behind %d", r.ASPath)
		}
		b.WriteByte('\n')
	}
	for _, d := range s.Directors {
		fmt.Fprintf(&b, "director %s\n", d)
	}
	return b.String()
}

func problems(list []ravel.Problem) string {
	var b strings.Builder
	for _, p := range list {
		fmt.Fprintln(&b, p)
	}
	return b.String()
}

func TestCompute(t *testing.T) {
	const all = `service tcp 192.0.2.20:80 mh
  -> 10.0.0.11 weight 2 last 2 auto
  -> 10.0.0.12 weight 1 last 1 auto
service tcp [2001:db8::20]:80 mh
  -> fd00::11 weight 1 last 1 auto
addr 192.0.2.20
addr 2001:db8::20
`
	tests := []struct {
		name     string
		change   func(*Inputs)
		want     string
		problems string
	}{
		{
			name: "a director",
			want: all + `peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65001 from 65100
route 192.0.2.20/32 via 10.0.0.1 [65100:1]
route 2001:db8::20/128 via fd00::1 [65100:1]
`,
		},
		{
			name:   "another director: the same services, its own peers and next hops",
			change: func(in *Inputs) { in.Node = "d2" },
			want: all + `peer 10.0.0.253 as 65002 from 65100
peer 10.0.0.254 as 65001 from 65100
route 192.0.2.20/32 via 10.0.0.2 [65100:1]
route 2001:db8::20/128 via fd00::2 [65100:1]
`,
		},
		{
			name:   "a longer path",
			change: func(in *Inputs) { in.Fleet.Policy.Prepend = 2 },
			want: all + `peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65001 from 65100
route 192.0.2.20/32 via 10.0.0.1 [65100:1] behind [65100 65100]
route 2001:db8::20/128 via fd00::1 [65100:1] behind [65100 65100]
`,
		},
		{
			name: "no longer path where a router of the own AS would take it for a loop",
			change: func(in *Inputs) {
				in.Fleet.Policy.Prepend = 2
				in.Fleet.Peers[0].Peer.ASN = 65100
			},
			want: all + `peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65100 from 65100
route 192.0.2.20/32 via 10.0.0.1 [65100:1]
route 2001:db8::20/128 via fd00::1 [65100:1]
`,
			problems: "fleet.prepend: nothing is prepended to the paths of 2 VIPs: a router of AS 65100, which d1 peers with, " +
				"would take its own number in them for a loop; set localPref instead\n",
		},
		{
			name: "a router that two entries choose for this director",
			change: func(in *Inputs) {
				p := in.Fleet.Peers[0]
				p.Directors, p.Labels, p.Peer.ASN = []string{"d1"}, nil, 65999
				in.Fleet.Peers = append(slices.Clone(in.Fleet.Peers), p)
			},
			want: all + `peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65001 from 65100
route 192.0.2.20/32 via 10.0.0.1 [65100:1]
route 2001:db8::20/128 via fd00::1 [65100:1]
`,
			problems: "fleet.peers[3]: this director has a session with 10.0.0.254 by an entry before this one, so this one is left out\n",
		},
		{
			name:   "attract none: everything but the routes",
			change: func(in *Inputs) { in.AttractNone = true },
			want:   all + "peer 10.0.0.252 as 65003 from 65100\npeer 10.0.0.254 as 65001 from 65100\n",
		},
		{
			name:     "a director that the fleet does not know announces nothing",
			change:   func(in *Inputs) { in.Node = "d9" },
			want:     all,
			problems: "fleet.directors: this director, d9, is not in the list, so it peers with nobody (the list has: d1, d2) (start it with --node NAME as the list has it, or add it to the list)\n",
		},
		{
			name:   "a realserver",
			change: func(in *Inputs) { in.Role, in.Node = ravel.Realserver, "r1" },
			want: `redirect tcp 192.0.2.20:80 to [10.1.1.1:8080 10.1.1.2:8080]
redirect tcp [2001:db8::20]:80 to [[fd01::1]:8080]
addr 192.0.2.20
addr 2001:db8::20
director 10.0.0.1
director 10.0.0.2
director fd00::1
director fd00::2
`,
		},
		{
			name: "terminating pods keep their node's slots, and serve where there is no other",
			change: func(in *Inputs) {
				in.Cluster.Services = in.Cluster.Services[:1]
				in.Cluster.Endpoints[0].Terminating = true
				in.Cluster.Endpoints[2].Ready, in.Cluster.Endpoints[2].Terminating = false, true
			},
			want: `service tcp 192.0.2.20:80 mh
  -> 10.0.0.11 weight 1 last 1 auto
  -> 10.0.0.12 weight 0 last 1 auto
addr 192.0.2.20
peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65001 from 65100
route 192.0.2.20/32 via 10.0.0.1 [65100:1]
`,
		},
		{
			name: "terminating pods take new flows where no ready one is left of the service",
			change: func(in *Inputs) {
				in.Cluster.Services = in.Cluster.Services[:1]
				for i := range in.Cluster.Endpoints {
					in.Cluster.Endpoints[i].Ready, in.Cluster.Endpoints[i].Terminating = false, true
				}
			},
			want: `service tcp 192.0.2.20:80 mh
  -> 10.0.0.11 weight 2 last 2 auto
  -> 10.0.0.12 weight 1 last 1 auto
addr 192.0.2.20
peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65001 from 65100
route 192.0.2.20/32 via 10.0.0.1 [65100:1]
`,
		},
		{
			name: "a cordoned node drains, and keeps its slots",
			change: func(in *Inputs) {
				in.Cluster.Services = in.Cluster.Services[:1]
				in.Cluster.Nodes[0].Draining = true
			},
			want: `service tcp 192.0.2.20:80 mh
  -> 10.0.0.11 weight 0 last 2 auto
  -> 10.0.0.12 weight 1 last 1 auto
addr 192.0.2.20
peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65001 from 65100
route 192.0.2.20/32 via 10.0.0.1 [65100:1]
`,
		},
		{
			name: "ready pods of a cordoned node take new flows where no other does, before terminating ones",
			change: func(in *Inputs) {
				in.Cluster.Services = in.Cluster.Services[:1]
				in.Cluster.Nodes[0].Draining = true
				in.Cluster.Endpoints[2].Ready, in.Cluster.Endpoints[2].Terminating = false, true
			},
			want: `service tcp 192.0.2.20:80 mh
  -> 10.0.0.11 weight 2 last 2 auto
  -> 10.0.0.12 weight 0 last 1 auto
addr 192.0.2.20
peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65001 from 65100
route 192.0.2.20/32 via 10.0.0.1 [65100:1]
`,
		},
		{
			name: "an excluded node is no real server, cordoned or not",
			change: func(in *Inputs) {
				in.Cluster.Services = in.Cluster.Services[:1]
				in.Cluster.Nodes[0].Excluded, in.Cluster.Nodes[0].Draining = true, true
			},
			want: `service tcp 192.0.2.20:80 mh
  -> 10.0.0.12 weight 1 last 1 auto
addr 192.0.2.20
peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65001 from 65100
route 192.0.2.20/32 via 10.0.0.1 [65100:1]
`,
		},
		{
			name: "a node that is not ready takes no new flows, a pod that never was ready counts nowhere",
			change: func(in *Inputs) {
				in.Cluster.Services = in.Cluster.Services[:1]
				in.Cluster.Nodes[0].Ready = false
				in.Cluster.Endpoints[2].Ready = false
			},
			// Nobody takes new flows: the VIP is served and not announced.
			want: `service tcp 192.0.2.20:80 mh
  -> 10.0.0.11 weight 0 last 2 auto
addr 192.0.2.20
peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65001 from 65100
`,
		},
		{
			name: "labels fence nodes, on both sides",
			change: func(in *Inputs) {
				in.Role, in.Node = ravel.Realserver, "r1"
				in.Cluster.Labels = map[string]string{"zone": "blue"}
			},
			want:     "director 10.0.0.1\ndirector 10.0.0.2\ndirector fd00::1\ndirector fd00::2\n",
			problems: "cluster.labels: none of the 3 nodes has all of these labels, so there is no real server\n",
		},
		{
			name: "labels that one node has",
			change: func(in *Inputs) {
				in.Cluster.Labels = map[string]string{"zone": "blue"}
				in.Cluster.Nodes[1].Labels = map[string]string{"zone": "blue", "rack": "a"}
				in.AttractNone, in.Fleet.Peers, in.Cluster.Services = true, nil, in.Cluster.Services[:1]
			},
			want: "service tcp 192.0.2.20:80 mh\n  -> 10.0.0.12 weight 1 last 1 auto\naddr 192.0.2.20\n",
		},
		{
			name: "a VIP that is a node's own address, a service that nobody knows, a node of both roles",
			change: func(in *Inputs) {
				in.Cluster.Services[0].Key = tcp("10.0.0.13", 80)
				in.Cluster.Services[1].Service = "nobody"
				in.Cluster.Nodes[1].Name = "d2"
			},
			want: "service tcp [2001:db8::20]:80 mh\naddr 2001:db8::20\n" +
				"peer 10.0.0.252 as 65003 from 65100\npeer 10.0.0.254 as 65001 from 65100\n",
			problems: `cluster.config.tcp 192.0.2.20:80: 10.0.0.13 as a VIP: the address is node r3's own
cluster.config.tcp [2001:db8::20]:80: service shop/nobody:http has no endpoints: nothing answers there
nodes.d2: is a director too, so it is no real server: in one network namespace the redirect would take every packet before IPVS sees it
`,
		},
		{
			name: "a director's host under another name is no real server either",
			change: func(in *Inputs) {
				in.AttractNone = true
				in.Cluster.Nodes[1].Addrs = []netip.Addr{ip("10.0.0.12"), ip("fd00::2")} // d2's
			},
			want: `service tcp 192.0.2.20:80 mh
  -> 10.0.0.11 weight 2 last 2 auto
service tcp [2001:db8::20]:80 mh
  -> fd00::11 weight 1 last 1 auto
addr 192.0.2.20
addr 2001:db8::20
peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65001 from 65100
`,
			problems: "nodes.r2: is a director too (d2, by its address), so it is no real server: " +
				"in one network namespace the redirect would take every packet before IPVS sees it\n",
		},
		{
			name: "an address that two nodes claim is the one's that is Ready",
			change: func(in *Inputs) {
				in.AttractNone = true
				in.Cluster.Nodes = append(in.Cluster.Nodes, Node{Name: "a-former-life-of-r2", Addrs: []netip.Addr{ip("10.0.0.12")}})
			},
			want: all + `peer 10.0.0.252 as 65003 from 65100
peer 10.0.0.254 as 65001 from 65100
`,
			problems: "nodes.a-former-life-of-r2: address 10.0.0.12 is node r2's, so its pods get no traffic by it\n",
		},
		{
			name: "an address that two nodes claim is the first one's",
			change: func(in *Inputs) {
				in.Cluster.Services = in.Cluster.Services[:1]
				in.Cluster.Nodes[1].Addrs = in.Cluster.Nodes[0].Addrs
				in.Fleet.Peers = nil
				in.AttractNone = true
			},
			want:     "service tcp 192.0.2.20:80 mh\n  -> 10.0.0.11 weight 2 last 2 auto\naddr 192.0.2.20\n",
			problems: "nodes.r2: address 10.0.0.11 is node r1's, so its pods get no traffic by it\nnodes.r2: address fd00::11 is node r1's, so its pods get no traffic by it\n",
		},
		{
			name: "announce all wants every service of the VIP, any wants one",
			change: func(in *Inputs) {
				extra := in.Cluster.Services[0]
				extra.Key.Port, extra.Service, extra.Where = 81, "empty", "cluster.config.81"
				in.Cluster.Services = []Service{in.Cluster.Services[0], extra}
				in.Fleet.Peers = nil
				in.Fleet.Pools = []Pool{{Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}, Policy: Policy{Announce: AnnounceAll}}}
			},
			want: `service tcp 192.0.2.20:80 mh
  -> 10.0.0.11 weight 2 last 2 auto
  -> 10.0.0.12 weight 1 last 1 auto
service tcp 192.0.2.20:81 mh
addr 192.0.2.20
`,
			problems: "cluster.config.81: service shop/empty:http has no endpoints: nothing answers there\n",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			in := small()
			if test.change != nil {
				test.change(&in)
			}
			state, found := Compute(in)
			if diff := cmp.Diff(test.want, text(state)); diff != "" {
				t.Errorf("state (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.problems, problems(found)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

func TestScaleWeights(t *testing.T) {
	tests := []struct {
		name       string
		have, want []int
		uneven     bool
	}{
		{"small weights stay as they are", []int{1, 5, 0, 63}, []int{1, 5, 0, 63}, false},
		{"the largest becomes 63", []int{126, 2, 64, 1}, []int{63, 1, 32, 1}, false},
		{"the sum becomes a quarter of the table", slices.Repeat([]int{63}, 33), slices.Repeat([]int{31}, 33), false},
		{"nobody who had a weight loses it", slices.Repeat([]int{1}, 1500), slices.Repeat([]int{1}, 1500), true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			servers := make([]wish, len(test.have))
			for i, w := range test.have {
				servers[i] = wish{Wish: roster.Wish{Weight: w}, last: w}
			}
			problem := scaleWeights(servers)
			var got []int
			for _, s := range servers {
				got = append(got, s.Weight)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("weights (-want +got):\n%s", diff)
			}
			if (problem != "") != test.uneven {
				t.Errorf("problem = %q, want one: %v", problem, test.uneven)
			}
		})
	}
}

// large is a fleet of a given size with a little of everything in it.
func large(rng *rand.Rand, services, nodes, endpoints int) Inputs {
	in := Inputs{Node: "d0", Fleet: Fleet{ASN: 65100}}
	for i := range 3 {
		in.Fleet.Directors = append(in.Fleet.Directors, FleetDirector{
			Name: fmt.Sprintf("d%d", i), Addrs: []netip.Addr{ip(fmt.Sprintf("10.255.0.%d", i+1)), ip(fmt.Sprintf("fd00:255::%d", i+1))},
		})
		in.Fleet.Peers = append(in.Fleet.Peers, FleetPeer{Peer: ravel.Peer{Addr: ip(fmt.Sprintf("10.254.0.%d", i+1)), Port: 179, ASN: 65001}})
	}
	for i := range nodes {
		in.Cluster.Nodes = append(in.Cluster.Nodes, Node{
			Name: fmt.Sprintf("node-%d", i), Ready: rng.IntN(50) > 0, Draining: rng.IntN(20) == 0, Excluded: rng.IntN(50) == 0,
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), ip(fmt.Sprintf("fd00:1::%x", i+1))},
		})
	}
	for i := range services {
		key := ravel.ServiceKey{VIP: netip.AddrFrom4([4]byte{192, 0, byte(i >> 9), byte(i >> 1)}), Proto: ravel.TCP, Port: uint16(80 + i%2)}
		if i%10 == 9 {
			key.VIP = ip(fmt.Sprintf("2001:db8::%x", i))
		}
		in.Cluster.Services = append(in.Cluster.Services, Service{
			Key: key, Namespace: "ns", Service: fmt.Sprintf("service-%d", i), PortName: "http", Scheduler: ravel.MH,
			Where: fmt.Sprintf("cluster.config[%d]", i),
		})
	}
	for i := range endpoints {
		service := i % services
		addr := netip.AddrFrom4([4]byte{10, byte(100 + i>>16), byte(i >> 8), byte(i)})
		if service%10 == 9 {
			addr = ip(fmt.Sprintf("fd01::%x", i))
		}
		in.Cluster.Endpoints = append(in.Cluster.Endpoints, Endpoint{
			Namespace: "ns", Service: fmt.Sprintf("service-%d", service), PortName: "http", Proto: ravel.TCP,
			Addr: addr, Port: 8080, Node: fmt.Sprintf("node-%d", rng.IntN(nodes)),
			Ready: rng.IntN(20) > 0, Terminating: rng.IntN(20) == 0,
		})
	}
	return in
}

// The laws of Compute: it ignores the order of its inputs, changes none of them, and gives directors equal services.
func TestLaws(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 50 {
		in := large(rng, 1+rng.IntN(40), 1+rng.IntN(20), rng.IntN(200))
		for i := range in.Cluster.Services {
			if s := &in.Cluster.Services[i]; rng.IntN(4) == 0 {
				s.Scheduler, s.UpperThreshold, s.LowerThreshold = "wlc", 100, 80
			}
		}
		in.Cluster.Pool = pool("192.0.0.1", "192.0.77.1", "2001:db8::77")
		in.Cluster = in.Cluster.WithDefault(&DefaultService{Namespace: "ns", Service: "service-0", PortName: "http", Port: 81})
		state, found := Compute(in)

		other := in
		other.Cluster.Services = slices.Clone(in.Cluster.Services)
		other.Cluster.Nodes = slices.Clone(in.Cluster.Nodes)
		other.Cluster.Endpoints = slices.Clone(in.Cluster.Endpoints)
		other.Fleet.Directors = slices.Clone(in.Fleet.Directors)
		other.Fleet.Peers = slices.Clone(in.Fleet.Peers)
		rng.Shuffle(len(other.Cluster.Services), func(i, j int) {
			other.Cluster.Services[i], other.Cluster.Services[j] = other.Cluster.Services[j], other.Cluster.Services[i]
		})
		rng.Shuffle(len(other.Cluster.Nodes), func(i, j int) {
			other.Cluster.Nodes[i], other.Cluster.Nodes[j] = other.Cluster.Nodes[j], other.Cluster.Nodes[i]
		})
		rng.Shuffle(len(other.Cluster.Endpoints), func(i, j int) {
			other.Cluster.Endpoints[i], other.Cluster.Endpoints[j] = other.Cluster.Endpoints[j], other.Cluster.Endpoints[i]
		})
		rng.Shuffle(len(other.Fleet.Peers), func(i, j int) {
			other.Fleet.Peers[i], other.Fleet.Peers[j] = other.Fleet.Peers[j], other.Fleet.Peers[i]
		})
		slices.Reverse(other.Fleet.Directors)
		again, foundAgain := Compute(other)
		if diff := cmp.Diff(state, again, addrs); diff != "" {
			t.Fatalf("the order of the inputs changed the state (-first +shuffled):\n%s", diff)
		}
		if diff := cmp.Diff(problems(found), problems(foundAgain)); diff != "" {
			t.Fatalf("the order of the inputs changed the problems:\n%s", diff)
		}

		other.Node = "d2"
		second, _ := Compute(other)
		if diff := cmp.Diff(state.Services, second.Services, addrs); diff != "" {
			t.Fatalf("two directors have other services (-d0 +d2):\n%s", diff)
		}

		// Promise P1 in the state itself: every route has a service that takes new flows.
		for _, r := range state.Routes {
			if !slices.ContainsFunc(state.Services, func(s ravel.VirtualService) bool {
				return s.Key.VIP == r.Prefix.Addr() && s.TakesNewFlows()
			}) {
				t.Fatalf("%s is routed and nobody takes its flows", r.Prefix)
			}
		}

		// What directors send to, realservers redirect: every real server with a weight has a redirect on its node.
		redirected := map[string]bool{}
		for _, n := range in.Cluster.Nodes {
			other.Role, other.Node = ravel.Realserver, n.Name
			local, _ := Compute(other)
			for _, r := range local.Redirects {
				a, _ := firstOf(n.Addrs, r.Key.VIP)
				redirected[r.Key.String()+a.String()] = true
			}
		}
		for _, s := range state.Services {
			for _, rs := range s.RealServers {
				if rs.Weight > 0 && !redirected[s.Key.String()+rs.Addr.String()] {
					t.Fatalf("%s sends to %s, where nothing redirects it", s.Key, rs.Addr)
				}
			}
		}
	}
}

func BenchmarkCompute(b *testing.B) {
	in := large(rand.New(rand.NewPCG(1, 1)), 1000, 500, 20000)
	b.Run("director", func(b *testing.B) {
		for b.Loop() {
			Compute(in)
		}
	})
	in.Role, in.Node = ravel.Realserver, "node-7"
	b.Run("realserver", func(b *testing.B) {
		for b.Loop() {
			Compute(in)
		}
	})
}
