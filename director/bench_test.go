package director

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// many is services × reals, every one on the same nodes.
func many(services, reals int) []ravel.VirtualService {
	list := make([]ravel.VirtualService, services)
	for i := range list {
		v := vs(fmt.Sprintf("tcp 192.0.%d.%d:80", i/250, i%250+1))
		for n := range reals {
			v.RealServers = append(v.RealServers, rs(netip.AddrFrom4([4]byte{10, 0, byte(n / 250), byte(n%250 + 1)}).String(), n%5+1))
		}
		list[i] = v
	}
	return list
}

// edges runs a benchmark on both kernels.
func edges(b *testing.B, bench func(b *testing.B, open func() (kernel, error))) {
	b.Run("fake", func(b *testing.B) { bench(b, (&fake{}).handle) })
	b.Run("real", func(b *testing.B) {
		nettest.Need(b, nettest.IPVS)
		flush(b)
		bench(b, open)
	})
}

// BenchmarkOneWeight changes one weight of one real server among 1,000 services of 20. kernel-ns/op is the same
// request without us, in the same run.
func BenchmarkOneWeight(b *testing.B) {
	edges(b, func(b *testing.B, open func() (kernel, error)) {
		d := start(b, Options{open: open})
		want := many(1000, 20)
		apply(b, d, want...)
		k := opened(b, open)
		var bare time.Duration
		n := 0
		for b.Loop() {
			n++
			v := &want[n%len(want)]
			v.RealServers = slices.Clone(v.RealServers)
			v.RealServers[7].Weight = n%50 + 10
			if _, err := d.Apply(b.Context(), want); err != nil {
				b.Fatal(err)
			}

			b.StopTimer()
			v = &want[(n+500)%len(want)]
			i := id{ServiceKey: v.Key}
			r := real{at: netip.AddrPortFrom(v.RealServers[7].Addr, v.Key.Port), weight: v.RealServers[7].Weight, method: ipvs.ConnectionFlagDirectRoute}
			request, destination := i.request(), r.destination()
			start := time.Now()
			err := k.UpdateDestination(request, destination)
			bare += time.Since(start)
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
		b.ReportMetric(float64(bare.Nanoseconds())/float64(n), "kernel-ns/op")
	})
}

// BenchmarkNothing applies 1,000 services of 20 that are there.
func BenchmarkNothing(b *testing.B) {
	d := start(b, Options{open: (&fake{}).handle})
	apply(b, d, many(1000, 20)...)
	want := many(1000, 20)
	for b.Loop() {
		if _, err := d.Apply(b.Context(), want); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkColdStart programs 1,000 services of 20 into an empty kernel: each time into another network namespace,
// because the kernel keeps removed real servers for two minutes and walks them all when one is added. kernel-ns/op is
// the part that the kernel's answers took.
func BenchmarkColdStart(b *testing.B) {
	nettest.Need(b, nettest.IPVS)
	want := many(1000, 20)
	var spent time.Duration
	for b.Loop() {
		d := start(b, Options{open: func() (kernel, error) {
			// The thread of the goroutine that owns the handle ends with it.
			runtime.LockOSThread()
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return nil, err
			}
			// Without an address of its own a kernel takes no real server.
			lo, err := netlink.LinkByName("lo")
			if err == nil {
				err = netlink.LinkSetUp(lo)
			}
			if err != nil {
				return nil, err
			}
			k, err := open()
			return timed{k, &spent}, err
		}})
		apply(b, d, want...)
		b.StopTimer()
		d.Close()
		b.StartTimer()
	}
	b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N), "kernel-ns/op")
}

// timed adds up the time that a new service and its real servers take in the kernel.
type timed struct {
	kernel
	spent *time.Duration
}

func (t timed) took(start time.Time) { *t.spent += time.Since(start) }

func (t timed) NewService(s *ipvs.Service) error {
	defer t.took(time.Now())
	return t.kernel.NewService(s)
}

func (t timed) UpdateService(s *ipvs.Service) error {
	defer t.took(time.Now())
	return t.kernel.UpdateService(s)
}

func (t timed) NewDestination(s *ipvs.Service, d *ipvs.Destination) error {
	defer t.took(time.Now())
	return t.kernel.NewDestination(s, d)
}

// BenchmarkWarmStart reads 1,000 services of 20 that outlived the last process, and finds nothing to do.
func BenchmarkWarmStart(b *testing.B) {
	edges(b, func(b *testing.B, open func() (kernel, error)) {
		want := many(1000, 20)
		apply(b, start(b, Options{open: open}), want...)
		for b.Loop() {
			d := start(b, Options{open: open})
			apply(b, d, want...)
			d.Close()
		}
	})
}

// BenchmarkOrder has one of 100 real servers change places with its neighbour: near the head, as of two that joined on
// two sides of a partition, and at the tail, so that all are added again. requests/op is what that takes.
func BenchmarkOrder(b *testing.B) {
	for _, bench := range []struct {
		name string
		at   int
	}{{"head", 1}, {"tail", 98}} {
		b.Run(bench.name, func(b *testing.B) {
			edges(b, func(b *testing.B, open func() (kernel, error)) {
				changes, n := 0, 0
				d := start(b, Options{open: func() (kernel, error) {
					k, err := open()
					return counting{k, &changes}, err
				}})
				want := many(1, 100)
				apply(b, d, want...)
				changes = 0
				for b.Loop() {
					n++
					reals := slices.Clone(want[0].RealServers)
					reals[bench.at], reals[bench.at+1] = reals[bench.at+1], reals[bench.at]
					want[0].RealServers = reals
					if _, err := d.Apply(b.Context(), want); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(changes)/float64(n), "requests/op")
			})
		})
	}
}

// BenchmarkDigests asks for the digests of 1,000 services of 20: when nothing changed, when one did, and when all were
// just read.
func BenchmarkDigests(b *testing.B) {
	edges(b, func(b *testing.B, open func() (kernel, error)) {
		d := start(b, Options{open: open})
		d.SetTableSize(4093)
		want := many(1000, 20)
		apply(b, d, want...)
		digests := func(b *testing.B) {
			if services, _, err := d.Digests(b.Context()); err != nil || len(services) != len(want) {
				b.Fatalf("%d digests, %v", len(services), err)
			}
		}
		digests(b)
		n := 0
		change := func(b *testing.B) {
			b.StopTimer()
			n++
			v := &want[n%len(want)]
			v.RealServers = slices.Clone(v.RealServers)
			v.RealServers[7].Weight = n%50 + 10
			if _, err := d.Apply(b.Context(), want); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
		b.Run("none", func(b *testing.B) {
			for b.Loop() {
				digests(b)
			}
		})
		b.Run("one", func(b *testing.B) {
			for b.Loop() {
				change(b)
				digests(b)
			}
		})
		b.Run("all", func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				d.Resync()
				if _, err := d.Apply(b.Context(), want); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				digests(b)
			}
		})
	})
}
