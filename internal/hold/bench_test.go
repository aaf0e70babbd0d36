package hold

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// large is 1,000 services on 500 nodes with 20,000 endpoints.
func large(reported bool) Documents {
	d := documents(0, 500)
	d.Reported = reported
	d.Cluster.Endpoints = nil
	for i := range 1000 {
		s := service(0, fmt.Sprintf("web%d", i))
		s.Key.VIP = netip.AddrFrom4([4]byte{192, 1, byte(i >> 8), byte(i)})
		d.Cluster.Services = append(d.Cluster.Services, s)
		for j := range 20 {
			d.Cluster.Endpoints = append(d.Cluster.Endpoints, endpoint((i*7+j*25)%500, s.Service))
		}
	}
	for i := range d.Cluster.Nodes {
		n := &d.Cluster.Nodes[i]
		n.Name, n.Addrs = fmt.Sprintf("n%02d", i), []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1})}
	}
	return d
}

func BenchmarkPodsComeAndGo(b *testing.B) {
	for _, reported := range []bool{true, false} {
		b.Run(fmt.Sprintf("reported=%t", reported), func(b *testing.B) {
			d, f := large(reported), fleetOf("d1")
			g := gate("d1")
			f.decide(g, d)
			other := d
			other.Cluster.Endpoints = slices.Clone(d.Cluster.Endpoints)
			other.Cluster.Endpoints[0].Ready = false
			if !reported {
				other.Cluster.Services = slices.Clone(d.Cluster.Services)
			}
			for b.Loop() {
				d, other = other, d
				g.Decide(time.Now(), d, f.Fleet)
			}
		})
	}
}

func BenchmarkAHeldChange(b *testing.B) {
	d, f := large(true), fleetOf("d1")
	g := gate("d1")
	f.decide(g, d)
	bad := d.edit(drop(900))
	for b.Loop() {
		bad.Cluster.Endpoints = slices.Clone(bad.Cluster.Endpoints)
		if g.Decide(time.Now(), bad, f.Fleet).Held == nil {
			b.Fatal("nothing is held")
		}
	}
}

func BenchmarkNothingNew(b *testing.B) {
	d, f := large(false), fleetOf("d1", "d2", "d3")
	g := gate("d1")
	f.decide(g, d)
	for b.Loop() {
		g.Decide(time.Now(), d, f.Fleet)
	}
}

func BenchmarkSave(b *testing.B) {
	d, f := large(false), fleetOf("d1")
	g := gate("d1")
	f.decide(g, d)
	saved, _ := g.Save()
	path := b.TempDir() + "/in-force.json"
	for b.Loop() {
		if err := saved.Store(path); err != nil {
			b.Fatal(err)
		}
	}
}
