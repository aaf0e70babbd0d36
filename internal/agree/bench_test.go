package agree

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
)

// large is a fleet of one director with 1,000 services on 500 nodes, 20 pods each.
func large(b *testing.B) (*world, *host) {
	b.Helper()
	w := newWorld(&testing.T{}, 1, 0)
	w.dir = b.TempDir()
	w.document.Cluster = desired.Cluster{}
	for i := range 500 {
		name := fmt.Sprintf("n%d", i)
		w.nodes[name] = &voice{
			member: ravel.Member{Name: name, Role: ravel.Realserver},
			report: ravel.Report{Redirects: map[ravel.ServiceKey]bool{}},
		}
		w.document.Cluster.Nodes = append(w.document.Cluster.Nodes, desired.Node{
			Name: name, Ready: true, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})},
		})
	}
	for i := range 1000 {
		key := ravel.ServiceKey{VIP: netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), Proto: ravel.TCP, Port: 80}
		service := fmt.Sprintf("s%d", i)
		w.document.Cluster.Services = append(w.document.Cluster.Services, desired.Service{
			Key: key, Namespace: "x", Service: service, Scheduler: ravel.MH, Flags: ravel.HashPort | ravel.Fallback, Where: service,
		})
		for j := range 20 {
			node := fmt.Sprintf("n%d", (i*7+j*25)%500)
			w.nodes[node].report.Redirects[key] = true
			w.document.Cluster.Endpoints = append(w.document.Cluster.Endpoints, desired.Endpoint{
				Namespace: "x", Service: service, Proto: ravel.TCP, Ready: true, Port: 8080, Node: node,
				Addr: netip.AddrFrom4([4]byte{10, byte(1 + j), byte(i >> 8), byte(i)}),
			})
		}
	}
	h := w.directors["d1"]
	h.start(timing)
	w.spread()
	for range 3 {
		h.step()
		w.now = w.now.Add(time.Second)
	}
	r, _ := h.agreed.Results().Latest()
	if n := len(r.State.Services[0].RealServers); n != 20 {
		b.Fatalf("a service has %d real servers", n)
	}
	return w, h
}

// What a look costs when gossip has news that changes nothing here.
func BenchmarkNews(b *testing.B) {
	w, h := large(b)
	for b.Loop() {
		h.agreed.step(b.Context(), w.now)
	}
}

// What it costs when a pod comes or goes.
func BenchmarkAPodComesOrGoes(b *testing.B) {
	w, h := large(b)
	all := w.document.Cluster.Endpoints
	one := slices.Clone(all[1:])
	for i := 0; b.Loop(); i++ {
		w.document.Cluster.Endpoints = all
		if i%2 == 0 {
			w.document.Cluster.Endpoints = one
		}
		h.read()
		w.now = w.now.Add(2 * time.Second)
		h.agreed.step(b.Context(), w.now)
	}
}
