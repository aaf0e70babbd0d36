//go:build kube

package e2e

import (
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/lab/cluster"
	"github.com/ravel-lb/ravel/lab/stage"
)

// Whatever a cluster's operator does every day to nodes and Deployments, not one request fails.
func TestEveryDayOfACluster(t *testing.T) {
	s, c, k := clusterFleet(t)
	explain(t, s)
	load := startLoad(t, s)
	step := func(what string, do func(), leftOut ...string) {
		t.Helper()
		do()
		took := taking(t, s, k, leftOut...)
		load.unbroken(t, what)
		t.Logf("%s: in the kernels of all directors after %s", what, took.Round(time.Millisecond))
	}

	step("r2 is cordoned", func() { patchNode(t, c, "r2", object{"spec": object{"unschedulable": true}}) }, "r2")
	step("r2 is uncordoned", func() { patchNode(t, c, "r2", object{"spec": object{"unschedulable": nil}}) })
	step("r3 is not Ready", func() { must(t, c.SetNodeReady(t.Context(), "r3", false)) }, "r3")
	step("r3 is Ready", func() { must(t, c.SetNodeReady(t.Context(), "r3", true)) })

	const exclude = "node.kubernetes.io/exclude-from-external-load-balancers"
	step("r1 is excluded", func() { patchNode(t, c, "r1", object{"metadata": object{"labels": object{exclude: ""}}}) }, "r1")
	step("r1 is not excluded", func() { patchNode(t, c, "r1", object{"metadata": object{"labels": object{exclude: nil}}}) })

	step("a pod is not Ready", func() { setReady(t, c, k, k.names("r1")[0], false) })
	step("it is Ready again", func() { setReady(t, c, k, k.names("")[0], true); readyAll(t, c, k) })

	// kubectl drain r1: cordon, then evict all pods, of which new ones come elsewhere.
	step("r1 is drained", func() {
		patchNode(t, c, "r1", object{"spec": object{"unschedulable": true}})
		for _, pod := range k.names("r1") {
			must(t, c.Call(t.Context(), http.MethodPost, kubePods+"/"+pod+"/eviction", object{
				"apiVersion": "policy/v1", "kind": "Eviction", "metadata": object{"name": pod, "namespace": stage.Namespace},
			}, nil))
		}
		eventually(t, time.Minute, func() error {
			if left := k.names("r1"); len(left) > 0 {
				return fmt.Errorf("r1 still has %v", left)
			}
			return nil
		})
		k.settled(t, replicas)
	})
	step("r1 is uncordoned", func() { patchNode(t, c, "r1", object{"spec": object{"unschedulable": nil}}) })

	step("a rolling update", func() {
		before := k.names("")
		must(t, c.Call(t.Context(), http.MethodPatch, deployments+"/web", object{"spec": object{"template": object{"metadata": object{
			"annotations": object{"example.net/version": fmt.Sprint(time.Now().UnixNano())},
		}}}}, nil))
		eventually(t, 2*time.Minute, func() error {
			var d struct {
				Metadata struct{ Generation int }
				Status   struct{ ObservedGeneration, Replicas, UpdatedReplicas, AvailableReplicas int }
			}
			if err := c.Call(t.Context(), http.MethodGet, deployments+"/web", nil, &d); err != nil {
				return err
			}
			if d.Status.ObservedGeneration < d.Metadata.Generation || d.Status.UpdatedReplicas != replicas ||
				d.Status.Replicas != replicas || d.Status.AvailableReplicas != replicas {
				return fmt.Errorf("%+v", d)
			}
			return nil
		})
		k.settled(t, replicas)
		for _, pod := range before {
			if k.pod(pod) != nil {
				t.Errorf("pod %s outlived the update", pod)
			}
		}
	})
	for _, n := range []int{1, 8, replicas} {
		step(fmt.Sprintf("scaled to %d", n), func() {
			must(t, c.Call(t.Context(), http.MethodPatch, deployments+"/web", object{"spec": object{"replicas": n}}, nil))
			k.settled(t, n)
		})
	}
	load.stop(t)
	for _, node := range append(s.Directors(), s.Realservers()...) {
		awaitApplied(t, s, node)
	}
}

// setReady has a pod fail its readiness probe, or pass it again.
func setReady(t *testing.T, c *cluster.Cluster, k *kubelets, name string, is bool) {
	t.Helper()
	must(t, c.SetPodReady(t.Context(), stage.Namespace, name, is))
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pods[name].ready = is
}

func readyAll(t *testing.T, c *cluster.Cluster, k *kubelets) {
	t.Helper()
	for _, name := range k.names("") {
		setReady(t, c, k, name, true)
	}
}

// The API server is away while clients go on and a director and a node's agent are restarted; it comes back with nothing in
// its caches. Nothing fails, no table is emptied, and what changes afterwards is followed.
func TestTheAPIServerIsAway(t *testing.T) {
	s, c, k := clusterFleet(t)
	explain(t, s)
	load := startLoad(t, s)
	restarted := []string{"d1", "r1"}
	for _, node := range restarted { // what a start takes where nobody answers was written, with all pods of both families
		eventually(t, time.Minute, func() error {
			role := map[byte]string{'d': "director", 'r': "realserver"}[node[0]]
			kept, err := s.Output(t.Context(), node, "cat", "/run/ravel/cluster-"+role+".json")
			if n := strings.Count(kept, `"state":"ready"`); err == nil && n != 2*replicas {
				err = fmt.Errorf("%s: what is kept has %d pods that are ready, not %d", node, n, 2*replicas)
			}
			return err
		})
	}
	before := map[string]string{}
	for _, d := range s.Directors() {
		table, err := proc(s, d)
		must(t, err)
		before[d] = lines(table)
	}
	must(t, c.StopAPIServer())
	away := time.Now()
	unchanged := func(when string) {
		t.Helper()
		load.unbroken(t, when)
		for _, d := range s.Directors() {
			table, err := proc(s, d)
			must(t, err)
			if now := lines(table); now != before[d] {
				t.Errorf("%s: %s holds another table:\n%s", when, d, diff(before[d], now))
			}
		}
	}
	unchanged("the API server is away")
	for _, node := range restarted {
		must(t, s.Process(node).Kill())
		must(t, s.Start(node))
	}
	must(t, s.WaitHops(within(t, time.Minute), stage.Routers(), vips, len(s.Directors())))
	unchanged("a director and an agent are restarted without it")
	for _, node := range restarted {
		eventually(t, 30*time.Second, func() error {
			open, err := metric(t.Context(), s, node, `ravel_kube_watch_open{resource="endpointslices"}`)
			if err == nil && open != "0" {
				err = fmt.Errorf("%s: a watch is open, by its own account: %s", node, open)
			}
			return err
		})
		eventually(t, 30*time.Second, func() error { // it takes what was kept when it has waited for the API server
			out, err := s.Ravel(t.Context(), node, "check")
			if err != nil || !strings.Contains(out, "warn  API server: does not tell of") {
				err = fmt.Errorf("%s: ravel check: %w, does not name the API server:\n%s", node, err, out)
			}
			return err
		})
	}
	for silence := time.Duration(number(t, "RAVEL_TEST_SILENCE", 15)) * time.Second; time.Since(away) < silence; {
		unchanged("the API server is still away")
	}
	t.Logf("the API server was away for %s", time.Since(away).Round(time.Second))

	must(t, c.StartAPIServer(t.Context()))
	must(t, c.RestartControllers(t.Context()))
	unchanged("the API server is back")
	must(t, c.Call(t.Context(), http.MethodPatch, deployments+"/web", object{"spec": object{"replicas": replicas + 2}}, nil))
	k.settled(t, replicas+2)
	taking(t, s, k)
	for _, node := range append(s.Directors(), s.Realservers()...) {
		eventually(t, time.Minute, func() error {
			out, err := s.Ravel(t.Context(), node, "check")
			if err != nil {
				err = fmt.Errorf("%s: %w: %s", node, err, out)
			}
			return err
		})
	}
	load.unbroken(t, "what changed after it came back is followed")
	must(t, c.Call(t.Context(), http.MethodPatch, deployments+"/web", object{"spec": object{"replicas": replicas}}, nil))
	k.settled(t, replicas)
	taking(t, s, k)
	load.unbroken(t, "in the end")
	load.stop(t)
}

// How long an endpoint takes to the kernels of directors and of its node, from the moment at which the API server is
// asked to write it. The change is made by hand in an EndpointSlice, so that no controller's time counts.
func TestHowLongAnEndpointTakes(t *testing.T) {
	s, c, _ := clusterFleet(t)
	explain(t, s)
	const service = "by-hand"
	vip := netip.MustParseAddr("198.51.100.25")
	d := shared.first.Clone()
	d.Services = append(d.Services, stage.Service{VIP: vip, Port: 80, Name: service, TCP: true})
	must(t, setDocument(t.Context(), c, d))
	const endpointSlices = "/apis/discovery.k8s.io/v1/namespaces/" + stage.Namespace + "/endpointslices"
	const services = "/api/v1/namespaces/" + stage.Namespace + "/services"
	must(t, c.Call(t.Context(), http.MethodPost, services, object{
		"metadata": object{"name": service}, "spec": object{"ports": []any{object{"name": stage.PortName, "port": 80, "protocol": "TCP"}}},
	}, nil))
	t.Cleanup(func() {
		must(t, c.Call(within(t, 20*time.Second), http.MethodDelete, services+"/"+service, nil, nil))
		must(t, c.Call(within(t, 20*time.Second), http.MethodDelete, endpointSlices+"/"+service, nil, nil))
	})
	// Pods of r1: the first is always there.
	var pods []stage.Pod
	for _, p := range s.Pods {
		if p.Node == "r1" {
			pods = append(pods, p)
		}
	}
	slice := func(n int) object {
		var endpoints []any
		for _, p := range pods[:n] {
			endpoints = append(endpoints, object{"addresses": []any{p.V4}, "nodeName": p.Node, "conditions": object{"ready": true}})
		}
		return object{
			"metadata":    object{"name": service, "labels": object{"kubernetes.io/service-name": service}},
			"addressType": "IPv4", "endpoints": endpoints,
			"ports": []any{object{"name": stage.PortName, "port": stage.PodPort, "protocol": "TCP"}},
		}
	}
	must(t, c.Call(t.Context(), http.MethodPost, endpointSlices, slice(1), nil))
	measureEndpoints(t, s, vip, number(t, "RAVEL_TEST_ENDPOINTS", 10), func(n int) {
		must(t, c.Call(t.Context(), http.MethodPut, endpointSlices+"/"+service, slice(n), nil))
	})
}

// measureEndpoints changes how many pods of r1 are behind port 80 of a VIP, 1 or 2 by turns, and logs how long each change
// took until the kernels had it.
func measureEndpoints(t *testing.T, s *stage.Stage, vip netip.Addr, changes int, set func(n int)) {
	t.Helper()
	key := ravel.ServiceKey{VIP: vip, Proto: ravel.TCP, Port: 80}
	at := nodeAddr("r1", vip)
	nat := openNAT(t, s, "r1", vip.Is6())
	has := func(n int) map[string]func() (bool, error) {
		looks := map[string]func() (bool, error){"r1": func() (bool, error) {
			table, err := nat.redirects()
			return len(table[key]) == n, err
		}}
		for _, d := range s.Directors() {
			looks[d] = func() (bool, error) {
				table, err := proc(s, d)
				return strings.Contains(table[key]+" ", fmt.Sprintf(" %s=%d ", at, n)), err
			}
		}
		return looks
	}
	// until looks again and again, as seldom as tells milliseconds apart: everything here shares one processor.
	until := func(n int, began time.Time) map[string]time.Duration {
		t.Helper()
		took := map[string]time.Duration{}
		looks := has(n)
		for deadline := time.Now().Add(time.Minute); len(looks) > 0; time.Sleep(3 * time.Millisecond) {
			for who, look := range looks {
				is, err := look()
				must(t, err)
				if is {
					took[who] = time.Since(began)
					delete(looks, who)
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("after a minute, these do not have %d pods: %v", n, looks)
			}
		}
		return took
	}
	until(1, time.Now())
	took := map[string][]time.Duration{}
	for i := range changes {
		time.Sleep(1500 * time.Millisecond) // changes of one table are a second apart: this is how long one alone takes
		n := 2 - i%2
		began, answered := time.Now(), make(chan time.Duration, 1)
		go func() {
			set(n)
			answered <- time.Since(began)
		}()
		one := until(n, began)
		api := <-answered
		took["the API server, to answer"] = append(took["the API server, to answer"], api)
		node, last := one["r1"], max(one["d1"], one["d2"], one["d3"])
		took["the realserver (the original: 2.1-9.9 s)"] = append(took["the realserver (the original: 2.1-9.9 s)"], node)
		took["all directors (the original: 0.2-4.9 s)"] = append(took["all directors (the original: 0.2-4.9 s)"], last)
		took["the first director"] = append(took["the first director"], min(one["d1"], one["d2"], one["d3"]))
		took["all directors, from the answer"] = append(took["all directors, from the answer"], max(0, last-api))
		took["the realserver, from the answer"] = append(took["the realserver, from the answer"], max(0, node-api))
	}
	for _, what := range slices.Sorted(maps.Keys(took)) {
		list := took[what]
		slices.Sort(list)
		t.Logf("an endpoint change took %s: median %s, 99th percentile %s, longest %s of %d", what, list[len(list)/2].Round(100*time.Microsecond),
			list[len(list)*99/100].Round(100*time.Microsecond), list[len(list)-1].Round(100*time.Microsecond), len(list))
	}
}
