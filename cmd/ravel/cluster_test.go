//go:build kube

package main

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/gossip/gossiptest"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/lab/cluster"
	"github.com/ravel-lb/ravel/lab/cluster/clustertest"
)

const fleetDocument = "asn: 65100\ndirectors:\n- {name: d1, addresses: [10.0.0.1]}\npeers: []\n"

// A director and a realserver follow a real API server: what it is told reaches their inputs, and what it cannot tell
// any more stays, also over a restart.
func TestRolesFollowACluster(t *testing.T) {
	c := clustertest.Start(t, "../..", cluster.Options{})
	type object = map[string]any
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	call := func(method, path string, body any) {
		t.Helper()
		must(c.Call(t.Context(), method, path, body, nil))
	}
	document := func(services string) object {
		return object{"metadata": object{"name": "lb"}, "data": object{
			"cluster": `{"config": {"192.0.2.80": {` + services + `}}, "config6": {}}`, "fleet": fleetDocument,
		}}
	}
	const web = `"80": {"namespace": "default", "service": "web", "portName": "p", "tcpEnabled": true}`
	call(http.MethodPost, "/api/v1/namespaces/default/configmaps", document(web))
	call(http.MethodPost, "/api/v1/namespaces/default/services", object{"metadata": object{"name": "web"}, "spec": object{
		"selector": object{"app": "web"}, "ports": []any{object{"name": "p", "port": 80, "targetPort": 8080}},
	}})
	for i := range 2 {
		node := fmt.Sprintf("r%d", i+1)
		must(c.AddNode(t.Context(), node, nil, netip.AddrFrom4([4]byte{10, 0, 0, byte(21 + i)})))
		must(c.AddPod(t.Context(), cluster.Pod{
			Namespace: "default", Name: "web-" + node, Node: node, Labels: map[string]string{"app": "web"},
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 4, byte(i), 10})},
		}))
	}
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	from, err := os.ReadFile(c.Kubeconfig())
	must(err)
	must(os.WriteFile(kubeconfig, from, 0o600))

	var network gossiptest.Network
	begin := func(role ravel.Role, name string, host byte, stateDir string) *reader {
		return readerWith(t, &network, role, name, host, values{stateDir: stateDir, kube: &kubeValues{
			kubeconfig: kubeconfig, namespace: "default", name: "lb", key: "cluster", fleetKey: "fleet",
			maxCacheAge: time.Hour, wait: time.Second, postsEvents: role == ravel.Director,
		}})
	}
	wants := func(what string, readers []*reader, ready []string) {
		t.Helper()
		for _, r := range readers {
			for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
				in, _ := r.inputs.Latest()
				var got []string
				for _, e := range in.Cluster.Endpoints {
					if e.Ready {
						got = append(got, e.Node)
					}
				}
				slices.Sort(got)
				if slices.Equal(got, ready) && len(in.Cluster.Services) == 1 && len(in.Fleet.Directors) == 1 {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s: %s has services %v, ready endpoints on %v, want %v; %v", what, r.settings.node, in.Cluster.Services, got, ready, r.documentProblems())
				}
			}
		}
	}
	stateDir := t.TempDir()
	d, r := begin(ravel.Director, "d1", 1, stateDir), begin(ravel.Realserver, "r1", 21, t.TempDir())
	both := []*reader{d, r}
	wants("at the start", both, []string{"r1", "r2"})
	in, _ := d.inputs.Latest()
	if problems := problemsOf(in); len(problems) > 0 {
		t.Errorf("problems: %v", problems)
	}
	must(c.SetPodReady(t.Context(), "default", "web-r2", false))
	wants("a pod is not ready", both, []string{"r1"})
	must(c.SetPodReady(t.Context(), "default", "web-r2", true))
	wants("it is again", both, []string{"r1", "r2"})

	// A broken document, and one that is gone, change nothing.
	for _, broken := range []string{`"80": {"namespace": 7, "tcpEnabled": true}`, `"80`} {
		call(http.MethodPut, "/api/v1/namespaces/default/configmaps/lb", document(broken))
		for deadline := time.Now().Add(20 * time.Second); len(d.documentProblems()) == 0; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("nothing is said of the document %s", broken)
			}
		}
		wants("the document is broken", both, []string{"r1", "r2"})
		call(http.MethodPut, "/api/v1/namespaces/default/configmaps/lb", document(web))
		for deadline := time.Now().Add(20 * time.Second); len(d.documentProblems()) > 0; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("said still: %v", d.documentProblems())
			}
		}
	}
	call(http.MethodDelete, "/api/v1/namespaces/default/configmaps/lb", nil)
	wants("the ConfigMap is deleted", both, []string{"r1", "r2"})
	call(http.MethodPost, "/api/v1/namespaces/default/configmaps", document(web))

	// Without an API server, what was last told goes on, also over a restart.
	kept := filepath.Join(stateDir, "cluster-director.json")
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(kept); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing was kept")
		}
	}
	must(c.StopAPIServer())
	d.stop()
	d = begin(ravel.Director, "d1", 1, stateDir)
	both = []*reader{d, r}
	wants("after a restart without an API server", both, []string{"r1", "r2"})
	if v, _ := d.cluster.Latest(); !v.Cached {
		t.Error("what came from the file does not say so")
	}
	must(c.StartAPIServer(t.Context()))
	must(c.SetPodReady(t.Context(), "default", "web-r1", false))
	must(c.RestartControllers(t.Context()))
	wants("the API server is back", both, []string{"r2"})
}

func problemsOf(in desired.Inputs) []ravel.Problem {
	_, problems := desired.Compute(in)
	return problems
}
