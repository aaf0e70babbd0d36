package desired

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
)

func pool(vips ...string) []PoolVIP {
	var list []PoolVIP
	for i, v := range vips {
		list = append(list, PoolVIP{VIP: ip(v), Where: fmt.Sprintf("cluster.vipPool[%d]", i)})
	}
	return list
}

// The default service programs IPVS on directors and redirects on realservers, and its VIPs are announced.
func TestDefaultServiceIsServed(t *testing.T) {
	in := small()
	in.Cluster.Pool = pool("192.0.2.20", "192.0.2.21", "2001:db8::21", "192.0.2.22")
	claim := in.Cluster.Services[0]
	claim.Key, claim.Service = ravel.ServiceKey{VIP: ip("192.0.2.22"), Proto: ravel.UDP, Port: 70}, "other"
	in.Cluster.Services = append(in.Cluster.Services[:1], claim)
	in.Cluster.Endpoints = append(in.Cluster.Endpoints,
		Endpoint{Namespace: "ops", Service: "unicorn", PortName: "www", Proto: ravel.TCP, Addr: ip("10.1.2.7"), Port: 7000, Node: "r2", Ready: true},
		Endpoint{Namespace: "ops", Service: "unicorn", PortName: "www", Proto: ravel.TCP, Addr: ip("fd01::7"), Port: 7000, Node: "r2", Ready: true})
	in.Fleet.Peers, in.Fleet.Policy, in.Fleet.Forwarding = nil, Policy{}, ravel.Tunnel
	in.Cluster = in.Cluster.WithDefault(&DefaultService{Namespace: "ops", Service: "unicorn", PortName: "www", Port: 70})
	state, found := Compute(in)
	const want = `service tcp 192.0.2.20:70 mh
  -> 10.0.0.12 weight 1 last 1 tunnel
service tcp 192.0.2.20:80 mh
  -> 10.0.0.11 weight 2 last 2 tunnel
  -> 10.0.0.12 weight 1 last 1 tunnel
service tcp 192.0.2.21:70 mh
  -> 10.0.0.12 weight 1 last 1 tunnel
service udp 192.0.2.22:70 mh
service tcp [2001:db8::21]:70 mh
  -> fd00::12 weight 1 last 1 tunnel
addr 192.0.2.20
addr 192.0.2.21
addr 192.0.2.22
addr 2001:db8::21
route 192.0.2.20/32 via 10.0.0.1 []
route 192.0.2.21/32 via 10.0.0.1 []
route 2001:db8::21/128 via fd00::1 []
`
	if diff := cmp.Diff(want, text(state)); diff != "" {
		t.Errorf("state of a director (-want +got):\n%s", diff)
	}
	const problem = "cluster.config.tcp 192.0.2.20:80: service shop/other:http has no endpoints: nothing answers there\n"
	if diff := cmp.Diff(problem, problems(found)); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	for _, v := range state.Services {
		if v.Key.Port == 70 && v.Key.Proto == ravel.TCP && v.Flags != ravel.Fallback|ravel.HashPort {
			t.Errorf("flags of %s are %#x", v.Key, v.Flags)
		}
	}
	in.Role, in.Node = ravel.Realserver, "r2"
	state, _ = Compute(in)
	const redirects = `redirect tcp 192.0.2.20:70 to [10.1.2.7:7000]
redirect tcp 192.0.2.20:80 to [10.1.2.1:8080]
redirect tcp 192.0.2.21:70 to [10.1.2.7:7000]
redirect tcp [2001:db8::21]:70 to [[fd01::7]:7000]
addr 192.0.2.20
addr 192.0.2.21
addr 2001:db8::21
director 10.0.0.1
director 10.0.0.2
director fd00::1
director fd00::2
`
	if diff := cmp.Diff(redirects, text(state)); diff != "" {
		t.Errorf("state of a realserver (-want +got):\n%s", diff)
	}
}

// The laws of a default service: each VIP of the pool has the port exactly once, what was claimed stays as it was, the
// order of the pool means nothing, and a second default changes nothing.
func TestDefaultServiceLaws(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 200 {
		c := large(rng, 1+rng.IntN(30), 3, 10).Cluster
		for _, i := range rng.Perm(20)[:rng.IntN(20)] {
			vip := netip.AddrFrom4([4]byte{192, 0, 0, byte(i)})
			if i%5 == 4 {
				vip = ip(fmt.Sprintf("2001:db8::%x", i))
			}
			c.Pool = append(c.Pool, PoolVIP{VIP: vip, Where: fmt.Sprintf("cluster.vipPool[%d]", i)})
		}
		before := slices.Clone(c.Services)
		d := &DefaultService{Namespace: "ops", Service: "unicorn", Port: uint16(80 + rng.IntN(3))}
		got := c.WithDefault(d)
		if diff := cmp.Diff(before, c.Services, addrs); diff != "" {
			t.Fatal("the cluster was changed:", diff)
		}
		if diff := cmp.Diff(before, got.Services[:len(before)], addrs); diff != "" {
			t.Fatal("claimed services were changed:", diff)
		}
		keys := map[ravel.ServiceKey]int{}
		for _, s := range got.Services {
			keys[s.Key]++
		}
		for _, v := range got.Pool {
			if n := keys[ravel.ServiceKey{VIP: v.VIP, Proto: ravel.TCP, Port: d.Port}]; n != 1 {
				t.Fatalf("%s has the port %d %d times", v.VIP, d.Port, n)
			}
		}
		rng.Shuffle(len(c.Pool), func(i, j int) { c.Pool[i], c.Pool[j] = c.Pool[j], c.Pool[i] })
		in := Inputs{Node: "d0", Fleet: Fleet{Directors: []FleetDirector{{Name: "d0"}}}}
		in.Cluster = got
		first, _ := Compute(in)
		in.Cluster = c.WithDefault(d)
		second, _ := Compute(in)
		if diff := cmp.Diff(first, second, addrs); diff != "" {
			t.Fatal("the order of the pool changed the state:", diff)
		}
		again := got.WithDefault(&DefaultService{Namespace: "ops", Service: "other", Port: 99})
		if len(again.Services) != len(got.Services) || again.Default != d {
			t.Fatalf("a second default service was added: %v", again.Services)
		}
	}
}

// Each director gives each real server its part of a service's thresholds, never less in sum than was asked for, and never
// a lower one that a full real server could not fall below.
func TestThresholds(t *testing.T) {
	for _, test := range []struct{ upper, lower, taking, wantUpper, wantLower int }{
		{0, 0, 3, 0, 0},
		{30000, 24000, 1, 30000, 24000},
		{30000, 24000, 4, 7500, 6000},
		{100, 80, 3, 34, 27},
		{10, 9, 3, 4, 3},
		{2, 1, 5, 1, 0},
		{10, 0, 3, 4, 0},
		{100, 80, 0, 0, 0},
		{1<<31 - 1, 1<<31 - 2, 2, 1 << 30, 1<<30 - 1},
	} {
		v := ravel.VirtualService{RealServers: []ravel.RealServer{{Weight: 0, LastWeight: 3}}}
		for range test.taking {
			v.RealServers = append(v.RealServers, ravel.RealServer{Weight: 2})
		}
		upper, lower := thresholds(Service{UpperThreshold: test.upper, LowerThreshold: test.lower}, v)
		if upper != test.wantUpper || lower != test.wantLower {
			t.Errorf("%d and %d among %d: got %d and %d, want %d and %d", test.upper, test.lower, test.taking, upper, lower, test.wantUpper, test.wantLower)
		}
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 10000 {
		s := Service{UpperThreshold: 1 + rng.IntN(1<<rng.IntN(31))}
		s.LowerThreshold = rng.IntN(s.UpperThreshold)
		taking := 1 + rng.IntN(600)
		v := ravel.VirtualService{RealServers: slices.Repeat([]ravel.RealServer{{Weight: 1}}, taking)}
		upper, lower := thresholds(s, v)
		if upper*taking < s.UpperThreshold || (upper-1)*taking >= s.UpperThreshold || lower < 0 || lower >= upper {
			t.Fatalf("%d and %d among %d: got %d and %d", s.UpperThreshold, s.LowerThreshold, taking, upper, lower)
		}
	}
}

// The MTU of a VIP is for its TCP redirects, on every node.
func TestMTU(t *testing.T) {
	in := small()
	udp := in.Cluster.Services[0]
	udp.Key.Proto = ravel.UDP
	in.Cluster.Services = append(in.Cluster.Services, udp)
	in.Cluster.MTU = map[netip.Addr]int{ip("192.0.2.20"): 1400, ip("2001:db8::99"): 1300}
	in.Role, in.Node = ravel.Realserver, "r1"
	state, _ := Compute(in)
	got := map[string]int{}
	for _, r := range state.Redirects {
		got[r.Key.String()] = r.MTU
	}
	want := map[string]int{"tcp 192.0.2.20:80": 1400, "udp 192.0.2.20:80": 0, "tcp [2001:db8::20]:80": 0}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
