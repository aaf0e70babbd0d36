//go:build kube

package main

import (
	"net/http"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel/lab/cluster"
	"github.com/ravel-lb/ravel/lab/cluster/clustertest"
)

// The ways in which an installation fails at a real API server.
func TestFailedInstallationsInACluster(t *testing.T) {
	inHost(t, func() {
		c := clustertest.Start(t, "../..", cluster.Options{Controllers: []string{}, Place: here(t)})
		h := newSite(t)
		for i, fault := range clusterFaults(t, h, c) {
			w := clusterWays[i]
			w.show = func(h *site) (int, string) {
				kubeconfig, word := fault()
				h.start(h.cluster(kubeconfig)...)
				return h.until(word, "check")
			}
			t.Log(w.name)
			w.try(h)
		}
	})
}

// clusterFaults make the faults of clusterWays, in their order. Each returns the kubeconfig to use and a word that is
// said then.
func clusterFaults(t *testing.T, h *site, c *cluster.Cluster) []func() (kubeconfig, word string) {
	t.Helper()
	type object = map[string]any
	call := func(method, path string, body any) {
		t.Helper()
		h.must(c.Call(t.Context(), method, path, body, nil))
	}
	const roles = "/apis/rbac.authorization.k8s.io/v1/clusterroles"
	call(http.MethodPost, roles, object{"metadata": object{"name": "some"}})
	call(http.MethodPost, "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", object{
		"metadata": object{"name": "some"},
		"subjects": []any{object{"kind": "User", "name": "stranger", "apiGroup": "rbac.authorization.k8s.io"}},
		"roleRef":  object{"kind": "ClusterRole", "name": "some", "apiGroup": "rbac.authorization.k8s.io"},
	})
	call(http.MethodPost, "/api/v1/namespaces", object{"metadata": object{"name": "ravel"}})
	stranger, err := c.NewKubeconfig("stranger")
	h.must(err)
	// may lets the stranger read these alone.
	may := func(resources ...string) string {
		call(http.MethodPut, roles+"/some", object{"metadata": object{"name": "some"}, "rules": []any{object{
			"apiGroups": []string{"", "discovery.k8s.io"}, "resources": resources, "verbs": []string{"list", "watch"},
		}}})
		text, err := os.ReadFile(stranger)
		h.must(err)
		return h.write("stranger", string(text))
	}
	const configMaps = "/api/v1/namespaces/ravel/configmaps"
	document := func(fleet object) string {
		fleet["cluster"] = `{"config": {"192.0.2.80": {"80": {"namespace": "default", "service": "web", "portName": "p", "tcpEnabled": true}}}}`
		_ = c.Call(t.Context(), http.MethodDelete, configMaps+"/lb", nil, nil) // may not be there
		call(http.MethodPost, configMaps, object{"metadata": object{"name": "lb"}, "data": fleet})
		return c.Kubeconfig()
	}
	return []func() (string, string){
		func() (string, string) { return may("configmaps", "nodes", "services"), "endpointslices: " },
		func() (string, string) { return may("endpointslices", "nodes", "services"), "configmaps: " },
		func() (string, string) { return h.kubeconfig(c.URL(), c.CA()), "Unauthorized" },
		func() (string, string) { return c.Kubeconfig(), "is not there" },
		func() (string, string) { return document(object{}), "is not in the ConfigMap" },
		func() (string, string) {
			return document(object{"fleet": "asn: 65100\ndirectors: 7\npeers: []\n"}), "cannot be used"
		},
	}
}

// thread is the network namespace of the caller, for goroutines of others.
type thread chan func()

func here(t *testing.T) cluster.Place {
	t.Helper()
	namespace, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = namespace.Close() }()
	place, entered := make(thread), make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the process, as do those that it started
		entered <- unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET)
		for fn := range place {
			fn()
		}
	}()
	if err := <-entered; err != nil {
		t.Fatal(err)
	}
	return place
}

// Do runs fn there.
func (p thread) Do(fn func() error) error {
	done := make(chan error)
	p <- func() { done <- fn() }
	return <-done
}
