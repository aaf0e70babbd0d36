package kube

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

// A large cluster, all of whose services the document names.
const (
	manyNodes     = 500
	manyServices  = 2000
	manyEndpoints = 20000
)

// A change of one endpoint, from the object that the API server tells to the value.
func BenchmarkEndpointChange(b *testing.B) {
	bare := newBare(Options{})
	bare.fill(b, large(manyServices, manyNodes, manyEndpoints)...)
	bare.value(b)
	objects := [2]any{largeSlice(7, 10, manyNodes), largeSlice(7, 9, manyNodes)}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		if err := bare.stores[kindSlices].Update(objects[i%2]); err != nil {
			b.Fatal(err)
		}
		if _, changed := bare.value(b); !changed {
			b.Fatal("nothing changed")
		}
	}
}

// A change of an endpoint slice of a service that no document names.
func BenchmarkForeignChange(b *testing.B) {
	bare := newBare(Options{})
	bare.fill(b, large(manyServices, manyNodes, manyEndpoints)...)
	bare.value(b)
	objects := [2]any{sliceOf("other", "x", "x-1", "10.1.0.1@node-1"), sliceOf("other", "x", "x-1", "10.1.0.2@node-1")}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		if err := bare.stores[kindSlices].Update(objects[i%2]); err != nil {
			b.Fatal(err)
		}
		if _, changed := bare.value(b); changed {
			b.Fatal("a foreign change is a value")
		}
	}
}

// Everything anew: caches that are filled, and the first value.
func BenchmarkFirstValue(b *testing.B) {
	objects := large(manyServices, manyNodes, manyEndpoints)
	b.ReportAllocs()
	for b.Loop() {
		bare := newBare(Options{})
		bare.fill(b, objects...)
		bare.value(b)
	}
}

// What the caches hold in memory, and the value on top of them, by how much of the cluster the document names.
func BenchmarkMemory(b *testing.B) {
	heap := func() float64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	for _, named := range []int{manyServices, 20} {
		b.Run(fmt.Sprintf("%d-named", named), func(b *testing.B) {
			for b.Loop() {
				start := heap()
				bare := newBare(Options{})
				func() {
					objects := large(manyServices, manyNodes, manyEndpoints)
					if named < manyServices {
						some := large(named, manyNodes, manyEndpoints/manyServices*named)
						objects = append(objects[:len(objects)-1], some[len(some)-1])
					}
					bare.fill(b, objects...)
				}()
				caches := heap()
				v, _ := bare.value(b)
				value := heap()
				b.ReportMetric((caches-start)/1e6, "MB-caches")
				b.ReportMetric((value-caches)/1e6, "MB-value")
				runtime.KeepAlive(v)
				runtime.KeepAlive(bare)
			}
		})
	}
}

// From the moment that the API server tells a change to the value, by way of a real connection and JSON, one change at a time.
func BenchmarkLatency(b *testing.B) {
	api := newAPIServer(b, large(manyServices, manyNodes, manyEndpoints)...)
	s := New(Options{Client: api.client(b), Namespace: "lb", Name: "ravel", Key: "cluster.json"})
	s.backoff = time.Second
	done := make(chan struct{})
	ctx, cancel := contextOf(b)
	go func() { defer close(done); _ = s.Run(ctx) }()
	defer func() { cancel(); <-done }()
	for {
		changed := s.Changed()
		if _, known := s.Latest(); known {
			break
		}
		<-changed
	}
	var took []time.Duration
	i := 0
	for b.Loop() {
		i++
		time.Sleep(s.gap) // calm
		changed := s.Changed()
		started := time.Now()
		api.set(largeSlice(i%manyServices, 10-i/manyServices%2-1, manyNodes))
		<-changed
		took = append(took, time.Since(started))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1e3, "ms-median")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1e3, "ms-p99")
}

// The file of the last good inputs.
func BenchmarkCacheFile(b *testing.B) {
	bare := newBare(Options{})
	bare.fill(b, large(manyServices, manyNodes, manyEndpoints)...)
	v, _ := bare.value(b)
	o := Options{Namespace: "lb", Name: "ravel", Key: "cluster.json"}
	file, err := encode(o, v, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	b.Run("encode", func(b *testing.B) {
		b.SetBytes(int64(len(file)))
		for b.Loop() {
			_, _ = encode(o, v, time.Now())
		}
	})
	b.Run("decode", func(b *testing.B) {
		b.SetBytes(int64(len(file)))
		for b.Loop() {
			if _, err := decode(o, file); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// A storm of changes is gathered: however many come, there is no more than a value every gap, and the last one is right.
func TestStorm(t *testing.T) {
	const services, nodes, changes = 200, 50, 3000
	objects := large(services, nodes, services*10)
	bare := newBare(Options{})
	bare.fill(t, objects...)
	s := New(Options{Client: newAPIServer(t).client(t), Namespace: "lb", Name: "ravel", Key: "cluster.json"})
	s.watches, s.caches = nil, bare.caches // no API server: this test tells
	ctx, cancel := contextOf(t)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	defer func() { cancel(); <-done }()
	waitFor(t, s, "the first", func(v Value) bool { return len(v.Cluster.Endpoints) == services*10 })

	values, counted := 0, make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(counted)
		for {
			select {
			case <-s.Changed():
				values++
			case <-stop:
				return
			}
		}
	}()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	last := map[int]int{}
	started := time.Now()
	for n := range changes {
		i := rng.IntN(services)
		last[i] = 1 + rng.IntN(10)
		must(t, bare.stores[kindSlices].Update(largeSlice(i, last[i], nodes)))
		if n%300 == 0 {
			time.Sleep(s.gap / 2) // it goes on for a while
		}
	}
	want := 0
	for i := range services {
		if n, touched := last[i]; touched {
			want += n
		} else {
			want += 10
		}
	}
	waitFor(t, s, "the last change", func(v Value) bool { return len(v.Cluster.Endpoints) == want })
	took := time.Since(started)
	close(stop)
	<-counted
	// Each value begins a gap after the one before; one may be under way at either end.
	if most := int(took/s.gap) + 2; values > most {
		t.Errorf("%d values of %d changes in %s, want %d at most", values, changes, took, most)
	}
	t.Logf("%d changes in %s made %d values", changes, took, values)
}

// 500 changes in a second of a large cluster, or with RAVEL_KUBE_STORM=1 ten times as many in ten times as long, by a real
// connection; what it costs this process, the test's API server and its JSON included, is printed.
func TestStormInALargeCluster(t *testing.T) {
	changes, lasts := 500, time.Second
	if os.Getenv("RAVEL_KUBE_STORM") != "" {
		changes, lasts = 10*changes, 10*lasts
	}
	api := newAPIServer(t, large(manyServices, manyNodes, manyEndpoints)...)
	s := source(t, Options{Client: api.client(t), Cache: t.TempDir() + "/cache"})
	waitFor(t, s, "the first", func(v Value) bool { return len(v.Cluster.Endpoints) == manyEndpoints })
	opened(t, s)
	var before, after syscall.Rusage
	must(t, syscall.Getrusage(syscall.RUSAGE_SELF, &before))
	var heap, most runtime.MemStats
	runtime.ReadMemStats(&heap)
	left := map[int]int{}
	first := testutil.ToFloat64(s.published)
	started := time.Now()
	for n := range changes {
		time.Sleep(time.Until(started.Add(lasts * time.Duration(n) / time.Duration(changes))))
		i := n * 7 % manyServices
		left[i] = 1 + n%10
		api.set(largeSlice(i, left[i], manyNodes))
		if n%100 == 0 {
			var m runtime.MemStats
			if runtime.ReadMemStats(&m); m.HeapAlloc > most.HeapAlloc {
				most = m
			}
		}
	}
	told := time.Now()
	want := manyEndpoints
	for _, n := range left {
		want += n - 10
	}
	waitFor(t, s, "the last change", func(v Value) bool { return len(v.Cluster.Endpoints) == want })
	must(t, syscall.Getrusage(syscall.RUSAGE_SELF, &after))
	cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	t.Logf("%d changes in %s made %.0f values; the last was there %s after it was told; %s of CPU; heap %d MB before, %d MB at most",
		changes, told.Sub(started).Round(time.Millisecond), testutil.ToFloat64(s.published)-first, time.Since(told).Round(time.Millisecond),
		cpu.Round(time.Millisecond), heap.HeapAlloc>>20, most.HeapAlloc>>20)
}
