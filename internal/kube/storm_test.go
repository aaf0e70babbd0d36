//go:build kube

package kube

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"

	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/lab/cluster"
	"github.com/ravel-lb/ravel/lab/cluster/clustertest"
)

// follower is set where this process is the one that follows: the kubeconfig.
const follower = "RAVEL_TEST_FOLLOW"

// 5,000 endpoint changes in 10 s at a real API server, in a cluster of 2,000 services that the document names, 500 nodes
// and 20,000 endpoints. A process that follows it, and computes from each value what a director should do, is done when
// the storm is: what it costs is printed.
func TestAStormAtARealAPIServer(t *testing.T) {
	if kubeconfig := os.Getenv(follower); kubeconfig != "" {
		follow(t, kubeconfig)
		return
	}
	const changes, lasts, writers = 5000, 10 * time.Second, 16
	c := clustertest.Start(t, "../..", cluster.Options{Controllers: []string{}}) // what there is, this test writes
	for _, namespace := range []string{"lb", "ns"} {
		must(t, c.Call(t.Context(), http.MethodPost, "/api/v1/namespaces", map[string]any{"metadata": map[string]any{"name": namespace}}, nil))
	}
	const slices = "/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices"
	var group errgroup.Group
	group.SetLimit(writers)
	for _, o := range large(manyServices, manyNodes, manyEndpoints) {
		path := map[string]string{
			kindNodes: "/api/v1/nodes", kindServices: "/api/v1/namespaces/ns/services", kindSlices: slices, kindConfigMaps: "/api/v1/namespaces/lb/configmaps",
		}[kindOf(o)]
		if s, is := o.(*corev1.Service); is {
			s.Spec.Ports = []corev1.ServicePort{{Name: "http", Port: 80}}
		}
		group.Go(func() error { return c.Call(t.Context(), http.MethodPost, path, o, nil) })
	}
	must(t, group.Wait())

	self := exec.Command(os.Args[0], "-test.run=^TestAStormAtARealAPIServer$", "-test.v")
	self.Env = append(os.Environ(), follower+"="+c.Kubeconfig())
	orders, err := self.StdinPipe()
	must(t, err)
	says, err := self.StdoutPipe()
	must(t, err)
	must(t, self.Start())
	t.Cleanup(func() { _ = self.Process.Kill(); _ = self.Wait() })
	lines := bufio.NewScanner(says)
	// until reads what the follower says until it knows so many endpoints.
	until := func(endpoints int) time.Time {
		t.Helper()
		want := fmt.Sprintf("endpoints %d", endpoints)
		for lines.Scan() {
			if lines.Text() == want {
				return time.Now()
			}
		}
		t.Fatalf("the follower ended before it knew %d endpoints: %v", endpoints, lines.Err())
		return time.Time{}
	}
	until(manyEndpoints)
	_, err = fmt.Fprintln(orders, "begin")
	must(t, err)

	want := manyEndpoints
	for i := range manyServices { // each is changed two or three times; the last time counts
		want += ofChange(lastOf(i, changes)) - 10
	}
	began := time.Now()
	for n := range changes {
		time.Sleep(time.Until(began.Add(lasts * time.Duration(n) / changes)))
		i := n % manyServices
		group.Go(func() error {
			return c.Call(t.Context(), http.MethodPut, fmt.Sprintf("%s/svc-%d-0", slices, i), largeSlice(i, ofChange(n), manyNodes), nil)
		})
	}
	must(t, group.Wait())
	written := time.Now()
	known := until(want)
	t.Logf("%d changes in %s; all of them were values %s after the last was written", changes, written.Sub(began).Round(time.Millisecond),
		known.Sub(written).Round(time.Millisecond))
	must(t, orders.Close())
	for lines.Scan() {
		if text, is := strings.CutPrefix(lines.Text(), "cost "); is {
			t.Log(text)
		}
	}
}

// ofChange is how many endpoints the n-th change leaves a service.
func ofChange(n int) int { return 1 + n%10 }

// lastOf is the last change of a service, of which the i-th is the first.
func lastOf(i, changes int) int { return i + (changes-1-i)/manyServices*manyServices }

// follow says how many endpoints each value has, and in the end what it cost since it was told to begin.
func follow(t *testing.T, kubeconfig string) {
	client, err := NewClient(kubeconfig, "test")
	must(t, err)
	s := New(Options{Client: client, Namespace: "lb", Name: "ravel", Key: "cluster.json", Cache: filepath.Join(t.TempDir(), "cache")})
	ctx, cancel := context.WithCancel(t.Context())
	var group errgroup.Group
	group.Go(func() error { return s.Run(ctx) })
	defer func() { cancel(); must(t, group.Wait()) }()
	ended := make(chan struct{})
	begun := make(chan struct{})
	go func() {
		defer close(ended)
		in := bufio.NewReader(os.Stdin)
		_, _ = in.ReadString('\n')
		close(begun)
		_, _ = io.Copy(io.Discard, in)
	}()
	var before, after syscall.Rusage
	var memory runtime.MemStats
	var heap, most uint64
	var first float64
	for {
		changed := s.Changed()
		if v, known := s.Latest(); known {
			state, _ := desired.Compute(desired.Inputs{Node: "d1", Cluster: v.Cluster, Fleet: desired.Fleet{
				ASN: 65100, Directors: []desired.FleetDirector{{Name: "d1"}},
			}})
			fmt.Printf("endpoints %d\n", len(v.Cluster.Endpoints))
			if len(state.Services) != manyServices {
				t.Errorf("%d services of %d", len(state.Services), manyServices)
			}
		}
		runtime.ReadMemStats(&memory)
		most = max(most, memory.HeapAlloc)
		select {
		case <-changed:
		case <-begun:
			heap, most, first = memory.HeapAlloc, 0, testutil.ToFloat64(s.published)
			must(t, syscall.Getrusage(syscall.RUSAGE_SELF, &before))
			begun = nil // it stays closed
		case <-ended:
			must(t, syscall.Getrusage(syscall.RUSAGE_SELF, &after))
			cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
			fmt.Printf("cost the process that follows made %.0f values, with a Compute of a director each: %s of CPU; heap %d MB before, %d MB at most; resident %d MB\n",
				testutil.ToFloat64(s.published)-first, cpu.Round(10*time.Millisecond), heap>>20, most>>20, after.Maxrss>>10)
			return
		}
	}
}
