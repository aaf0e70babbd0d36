//go:build kube

// The tests of these files have the whole fleet follow a Kubernetes cluster: a real etcd, API server and
// kube-controller-manager on the lab's node k1, and on the lab's pods what the Deployments ask for. make kube runs them.

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/lab/cluster"
	"github.com/ravel-lb/ravel/lab/stage"
)

type object = map[string]any

// Where Ravel's documents are in the cluster.
const (
	configNamespace = "lb"
	configName      = "ravel"
	clusterKey      = "cluster.json"
	fleetKey        = "fleet.yaml"
	configMaps      = "/api/v1/namespaces/" + configNamespace + "/configmaps"
	deployments     = "/apis/apps/v1/namespaces/" + stage.Namespace + "/deployments"
	replicas        = 6
)

// apiServer is where the cluster's API server is.
var apiServer = netip.MustParseAddrPort("10.1.0.31:6443")

// clusterDir has the cluster's files: one that nodes and this process see, and that is not on a disk in the lab kernel.
const clusterDir = "/tmp/ravel-cluster"

func init() { seenByAll = append(seenByAll, clusterDir) }

// kube is the cluster that the tests share.
var kube struct {
	once       sync.Once
	cluster    *cluster.Cluster
	kubelets   *kubelets
	kubeconfig string
	err        error
}

// clusterFleet returns the shared fleet with a cluster that it follows, in their first state: six pods of Deployment web
// are behind the two VIPs, port 80, TCP and UDP, and take flows.
func clusterFleet(t *testing.T) (*stage.Stage, *cluster.Cluster, *kubelets) {
	t.Helper()
	return clusterFleetWith(t, nil, nil)
}

func clusterFleetWith(t *testing.T, directorArgs, realserverArgs []string) (*stage.Stage, *cluster.Cluster, *kubelets) {
	t.Helper()
	s, c, k := clusterStage(t)
	must(t, setDocument(t.Context(), c, shared.first))
	runAll(t, s, []string{
		"--kubeconfig", kube.kubeconfig, "--config-namespace", configNamespace, "--config-name", configName,
		"--config-key", clusterKey, "--fleet-key", fleetKey,
	}, directorArgs, realserverArgs)
	k.settled(t, replicas)
	must(t, s.WaitHops(within(t, 2*time.Minute), stage.Routers(), vips, len(s.Directors())))
	taking(t, s, k)
	return s, c, k
}

// clusterStage returns the shared fleet, on which ravel may run or not, with the cluster.
func clusterStage(t *testing.T) (*stage.Stage, *cluster.Cluster, *kubelets) {
	t.Helper()
	s := stageOf(t)
	kube.once.Do(func() { kube.err = startCluster(t, s) })
	if kube.err != nil {
		t.Fatal(kube.err)
	}
	return s, kube.cluster, kube.kubelets
}

func startCluster(t *testing.T, s *stage.Stage) (err error) {
	ctx := within(t, 5*time.Minute)
	const binary = "build/kube/kube"
	if _, err := os.Stat(binary); err != nil {
		return fmt.Errorf("%w; run make kube", err)
	}
	began := time.Now()
	dir, err := os.MkdirTemp(clusterDir, "")
	if err != nil {
		return err
	}
	c, err := cluster.Start(ctx, filepath.Join(dir, "cluster"), cluster.Options{
		Binary: binary, Place: s.Fleet.Node("k1"), Addr: apiServer.Addr(), Port: apiServer.Port(), EtcdPort: 2379,
		// The others are for what deploy/ has.
		Controllers: append(slices.Clone(cluster.DefaultControllers), "daemonset-controller", "job-controller", "disruption-controller"),
	})
	if err != nil {
		return err
	}
	t.Logf("etcd and the API server were ready after %.1f s", time.Since(began).Seconds())
	kube.cluster = c
	for _, name := range []string{configNamespace, stage.Namespace} {
		if err := c.Call(ctx, http.MethodPost, "/api/v1/namespaces", object{"metadata": object{"name": name}}, nil); err != nil {
			return err
		}
	}
	for _, node := range s.Realservers() {
		v4, v6 := stage.NodeAddrs(node)
		if err := c.AddNode(ctx, node, nil, v4, v6); err != nil {
			return err
		}
	}
	if err := grant(ctx, c); err != nil {
		return err
	}
	if kube.kubeconfig, err = c.NewKubeconfig("system:serviceaccount:lb:ravel", "system:serviceaccounts"); err != nil {
		return err
	}
	kube.kubelets = startKubelets(s, c)
	if err := c.Call(ctx, http.MethodPost, "/api/v1/namespaces/"+stage.Namespace+"/services", object{
		"metadata": object{"name": "web"},
		"spec": object{
			"selector": object{"app": "web"}, "ipFamilyPolicy": "RequireDualStack",
			"ports": []any{object{"name": stage.PortName, "port": 80, "targetPort": kubePodPort, "protocol": "TCP"}},
		},
	}, nil); err != nil {
		return err
	}
	return c.Call(ctx, http.MethodPost, deployments, object{
		"metadata": object{"name": "web"},
		"spec": object{
			"replicas": replicas,
			"strategy": object{"rollingUpdate": object{"maxSurge": 2, "maxUnavailable": 0}},
			"selector": object{"matchLabels": object{"app": "web"}},
			"template": object{
				"metadata": object{"labels": object{"app": "web"}},
				"spec":     object{"containers": []any{object{"name": "pod", "image": "none"}}, "terminationGracePeriodSeconds": 30},
			},
		},
	}, nil)
}

// grant gives Ravel the rights that docs/kubernetes.md lists, and no others.
func grant(ctx context.Context, c *cluster.Cluster) error {
	const rbac = "/apis/rbac.authorization.k8s.io/v1/"
	rule := func(group, resource string, verbs ...string) object {
		return object{"apiGroups": []any{group}, "resources": []any{resource}, "verbs": verbs}
	}
	subjects := []any{object{"kind": "ServiceAccount", "namespace": configNamespace, "name": "ravel"}}
	inNamespace := rbac + "namespaces/" + configNamespace + "/"
	ofConfigMap := rule("", "configmaps", "get", "list", "watch")
	ofConfigMap["resourceNames"] = []any{configName}
	for _, add := range []struct {
		path string
		what object
	}{
		{rbac + "clusterroles", object{"metadata": object{"name": "ravel-e2e"}, "rules": []any{
			rule("", "nodes", "list", "watch"), rule("", "services", "list", "watch"), rule("discovery.k8s.io", "endpointslices", "list", "watch"),
		}}},
		{rbac + "clusterrolebindings", object{
			"metadata": object{"name": "ravel-e2e"}, "subjects": subjects,
			"roleRef": object{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "ravel-e2e"},
		}},
		{inNamespace + "roles", object{"metadata": object{"name": "ravel-e2e"}, "rules": []any{ofConfigMap, rule("", "events", "create")}}},
		{inNamespace + "rolebindings", object{
			"metadata": object{"name": "ravel-e2e"}, "subjects": subjects,
			"roleRef": object{"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "ravel-e2e"},
		}},
	} {
		if err := c.Call(ctx, http.MethodPost, add.path, add.what, nil); err != nil {
			return err
		}
	}
	return nil
}

// setDocument makes a document that of the cluster.
func setDocument(ctx context.Context, c *cluster.Cluster, d stage.Document) error {
	cluster, fleet := d.ConfigMap()
	return setConfigMap(ctx, c, object{clusterKey: string(cluster), fleetKey: string(fleet)})
}

// setConfigMap replaces the data of the ConfigMap, or makes it.
func setConfigMap(ctx context.Context, c *cluster.Cluster, data object) error {
	body := object{"metadata": object{"name": configName}, "data": data}
	err := c.Call(ctx, http.MethodPut, configMaps+"/"+configName, body, nil)
	var status *cluster.StatusError
	if errors.As(err, &status) && status.Code == http.StatusNotFound {
		err = c.Call(ctx, http.MethodPost, configMaps, body, nil)
	}
	return err
}

// taking waits until on every director just those nodes take new flows of the document's services that have ready pods,
// each as many as it has, and returns how long that took. Nodes that are left out have weight 0.
func taking(t *testing.T, s *stage.Stage, k *kubelets, leftOut ...string) time.Duration {
	t.Helper()
	began := time.Now()
	eventually(t, time.Minute, func() error {
		pods := k.ready()
		for _, node := range leftOut {
			delete(pods, node)
		}
		want := map[ravel.ServiceKey]map[netip.Addr]int{}
		for _, vip := range vips {
			for _, proto := range []ravel.Proto{ravel.TCP, ravel.UDP} {
				weights := map[netip.Addr]int{}
				for node, n := range pods {
					weights[nodeAddr(node, vip)] = n
				}
				want[ravel.ServiceKey{VIP: vip, Proto: proto, Port: 80}] = weights
			}
		}
		for _, d := range s.Directors() {
			table, err := proc(s, d)
			if err == nil {
				err = asWanted(table, want)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", d, err)
			}
		}
		return nil
	})
	return time.Since(began)
}

// patchNode changes a node of the cluster.
func patchNode(t *testing.T, c *cluster.Cluster, node string, patch object) {
	t.Helper()
	must(t, c.Call(t.Context(), http.MethodPatch, "/api/v1/nodes/"+node, patch, nil))
}

// explain logs what there is to know of the fleet when a test failed.
func explain(t *testing.T, s *stage.Stage) {
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, node := range append(s.Directors(), s.Realservers()...) {
			out, _ := s.Ravel(context.Background(), node, "check")
			t.Logf("%s: ravel check: %s", node, strings.TrimSpace(out))
		}
	})
}
