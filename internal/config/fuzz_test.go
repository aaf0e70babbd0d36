package config

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
)

// FuzzParse: nothing panics; what parses keeps what the fields of package desired promise, and parses the same again.
func FuzzParse(f *testing.F) {
	f.Add(docsExample(f))
	f.Add(smallExample(f))
	f.Add(originalExample(f))
	for _, table := range [][]struct{ name, doc, want string }{badDocuments, badClusters, badFleets, badNodes} {
		for _, tt := range table {
			f.Add([]byte(tt.doc))
		}
	}
	f.Add([]byte(cluster(`{config: {192.0.2.1: {80: {namespace: a, service: b, tcpEnabled: true, ipvsOptions: {scheduler: rr, uThreshold: 7, lThreshold: 5}}}},
  vipPool: [192.0.2.1, 192.0.2.2], mtuConfig: {192.0.2.1: "1400"}, defaultService: {namespace: a, service: b, port: 80}}`)))
	f.Add([]byte("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n"))
	f.Add([]byte(`{"cluster":{"config":{}},"fleet":{"asn":1.5,"announce":"\ud83d\ude00"},"nodes":[],"endpoints":[]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse(b)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || len(e.Faults) == 0 {
				t.Fatalf("no faults in %v", err)
			}
			for _, p := range e.Faults {
				if p.Where == "" || p.What == "" || !utf8.ValidString(p.String()) {
					t.Errorf("fault %q", p)
				}
			}
			return
		}
		keeps(t, s)
		again, err := Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(s, again, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
			cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Error("parsed twice:", diff)
		}
	})
}

// keeps checks a value against the comments on the fields of package desired.
func keeps(t *testing.T, s Static) {
	t.Helper()
	keys := map[ravel.ServiceKey]bool{}
	vips := map[netip.Addr]bool{}
	for _, v := range s.Cluster.Services {
		if keys[v.Key] {
			t.Errorf("key %s twice", v.Key)
		}
		keys[v.Key], vips[v.Key.VIP] = true, true
		switch {
		case !usable(v.Key.VIP), v.Key.Port == 0, v.Key.Proto != ravel.TCP && v.Key.Proto != ravel.UDP:
			t.Errorf("key %s", v.Key)
		case v.Namespace == "" || v.Service == "" || v.Where == "":
			t.Errorf("service without a name or place: %+v", v)
		case !slices.Contains(ravel.Schedulers(), v.Scheduler) || v.Flags&^(ravel.Fallback|ravel.HashPort) != 0:
			t.Errorf("scheduler %s, flags %x", v.Scheduler, v.Flags)
		case v.UpperThreshold != 0 && v.Scheduler == ravel.MH, v.LowerThreshold < 0, v.LowerThreshold >= max(v.UpperThreshold, 1):
			t.Errorf("thresholds %d and %d by %s", v.UpperThreshold, v.LowerThreshold, v.Scheduler)
		case v.OnePacket && v.Key.Proto != ravel.UDP:
			t.Errorf("%s one packet at a time", v.Key)
		}
	}
	pool := map[netip.Addr]bool{}
	for _, v := range s.Cluster.Pool {
		if !usable(v.VIP) || pool[v.VIP] || v.Where == "" {
			t.Errorf("VIP of the pool %+v", v)
		}
		pool[v.VIP] = true
		d := s.Cluster.Default
		if d != nil && !keys[ravel.ServiceKey{VIP: v.VIP, Proto: ravel.TCP, Port: d.Port}] &&
			!keys[ravel.ServiceKey{VIP: v.VIP, Proto: ravel.UDP, Port: d.Port}] {
			t.Errorf("%s has nothing on port %d", v.VIP, d.Port)
		}
	}
	for vip, mtu := range s.Cluster.MTU {
		if !usable(vip) || mtu < 1280 || mtu > 9216 || !vips[vip] && !pool[vip] {
			t.Errorf("MTU %d of %s", mtu, vip)
		}
	}
	names, owners := map[string]bool{}, map[netip.Addr]bool{}
	for _, n := range s.Cluster.Nodes {
		if n.Name == "" || names[n.Name] || len(n.Addrs) == 0 {
			t.Errorf("node %+v", n)
		}
		names[n.Name] = true
		for _, a := range n.Addrs {
			if !usable(a) || owners[a] || vips[a] {
				t.Errorf("address %s of node %s", a, n.Name)
			}
			owners[a] = true
		}
	}
	for _, e := range s.Cluster.Endpoints {
		if e.Namespace == "" || e.Service == "" || e.Node == "" || e.Port == 0 || !usable(e.Addr) || vips[e.Addr] ||
			e.Ready && e.Terminating || e.Proto != ravel.TCP && e.Proto != ravel.UDP {
			t.Errorf("endpoint %+v", e)
		}
	}
	fleetKeeps(t, s.Fleet)
}

func fleetKeeps(t *testing.T, f desired.Fleet) {
	t.Helper()
	names := map[string]bool{}
	for _, d := range f.Directors {
		if d.Name == "" || names[d.Name] || len(d.Addrs) == 0 || len(d.Addrs) > 2 || len(d.Addrs) == 2 && d.Addrs[0].Is4() == d.Addrs[1].Is4() ||
			d.RouterID.IsValid() && (!d.RouterID.Is4() || d.RouterID.IsUnspecified()) {
			t.Errorf("director %+v", d)
		}
		names[d.Name] = true
	}
	if len(f.Peers) > 0 && f.ASN == 0 {
		t.Error("peers and no AS number")
	}
	for _, p := range f.Peers {
		v := p.Peer
		if !usable(v.Addr) || v.Port == 0 || v.ASN == 0 || v.HoldTime < desired.DefaultHoldTime || v.Keepalive < time.Second ||
			v.Keepalive >= v.HoldTime || v.HoldTime%time.Second != 0 || v.Keepalive%time.Second != 0 ||
			v.LocalAddr.IsValid() && v.LocalAddr.Is4() != v.Addr.Is4() {
			t.Errorf("peer %+v", v)
		}
	}
	policyKeeps(t, f.Policy)
	names = map[string]bool{}
	var prefixes []netip.Prefix
	for _, p := range f.Pools {
		if p.Name == "" || names[p.Name] || len(p.Prefixes) == 0 {
			t.Errorf("pool %+v", p)
		}
		names[p.Name] = true
		policyKeeps(t, p.Policy)
		for _, prefix := range p.Prefixes {
			if !prefix.IsValid() || prefix != prefix.Masked() || prefix.Addr().Is4In6() ||
				slices.ContainsFunc(prefixes, prefix.Overlaps) {
				t.Errorf("prefix %s of pool %s", prefix, p.Name)
			}
			prefixes = append(prefixes, prefix)
		}
	}
}

func policyKeeps(t *testing.T, p desired.Policy) {
	t.Helper()
	large := slices.IsSortedFunc(p.LargeCommunities, ravel.LargeCommunity.Compare)
	if !slices.IsSorted(p.Communities) || !large || len(slices.Compact(slices.Clone(p.Communities))) != len(p.Communities) ||
		len(slices.Compact(slices.Clone(p.LargeCommunities))) != len(p.LargeCommunities) {
		t.Errorf("policy %+v", p)
	}
}

func usable(a netip.Addr) bool {
	return a.IsGlobalUnicast() && a.Zone() == "" && !a.Is4In6()
}
