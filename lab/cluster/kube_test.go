//go:build kube

// The control plane itself: make e2e runs these, with -tags kube, for lab/kube takes minutes to build the first time.

package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/lab/fleet"
	"github.com/ravel-lb/ravel/lab/topology"
)

func TestMain(m *testing.M) {
	// Before the tests are in a network of their own, from where there is no way to a module proxy.
	if _, err := Build(context.Background(), "../.."); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	nettest.Main(m)
}

// patience is for what takes milliseconds on a quiet machine.
const patience = 3 * time.Minute

// start starts a cluster, which ends with the test and leaves nothing.
func start(t *testing.T, opts Options) *Cluster {
	t.Helper()
	return startIn(t, t.TempDir(), opts)
}

func startIn(t *testing.T, dir string, opts Options) *Cluster {
	t.Helper()
	var err error
	opts.Binary, err = Build(t.Context(), "../..")
	must(t, err)
	began := time.Now()
	c, err := Start(t.Context(), filepath.Join(dir, "cluster"), opts)
	must(t, err)
	t.Logf("etcd and the API server were ready after %.1f s", time.Since(began).Seconds())
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			for _, name := range []string{"apiserver", "controller-manager"} {
				text, _ := os.ReadFile(c.file(name + ".log"))
				t.Logf("%s: %s", name, text[max(0, len(text)-3000):])
			}
		}
		nothingLeft(t, c)
	})
	return c
}

// nothingLeft looks for a process that the cluster started, and for its listeners.
func nothingLeft(t *testing.T, c *Cluster) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range lines {
		if text, err := os.ReadFile(path); err == nil && strings.Contains(string(text), c.dir) {
			t.Errorf("left behind: %s", strings.ReplaceAll(string(text), "\x00", " "))
		}
	}
	for _, port := range []uint16{c.opts.Port, c.opts.EtcdPort} {
		conn, err := c.dial(context.Background(), "tcp", netip.AddrPortFrom(c.opts.Addr, port).String())
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("port %d: %v, want nobody there", port, err)
		}
		if err == nil {
			_ = conn.Close()
		}
	}
}

// slices of Service web, an endpoint a line: "10.1.0.1 n1 ready serving".
func endpoints(t *testing.T, c *Cluster, service string) string {
	t.Helper()
	var list struct {
		Items []struct {
			AddressType string
			Ports       []struct{ Port int }
			Endpoints   []struct {
				Addresses  []string
				NodeName   string
				Conditions map[string]bool
			}
		}
	}
	path := "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices?labelSelector=kubernetes.io/service-name%3D" + service
	if err := c.Call(t.Context(), http.MethodGet, path, nil, &list); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, s := range list.Items {
		for _, e := range s.Endpoints {
			line := fmt.Sprintf("%s:%d %s", e.Addresses[0], s.Ports[0].Port, e.NodeName)
			for _, name := range []string{"ready", "serving", "terminating"} {
				if e.Conditions[name] {
					line += " " + name
				}
			}
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func become(t *testing.T, c *Cluster, service string, want ...string) time.Duration {
	t.Helper()
	return eventually(t, "endpoints of "+service, patience, func() error {
		if got := endpoints(t, c, service); got != strings.Join(want, "\n") {
			return fmt.Errorf("they are\n%s\nwant\n%s", got, strings.Join(want, "\n"))
		}
		return nil
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// web makes nodes n1 to n3 with a pod each, and Service web in front of them.
func web(t *testing.T, c *Cluster) {
	t.Helper()
	for i := range 3 {
		node := fmt.Sprintf("n%d", i+1)
		must(t, c.AddNode(t.Context(), node, nil, netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", i+1))))
		must(t, c.AddPod(t.Context(), Pod{
			Namespace: "default", Name: "web-" + node, Node: node, Labels: map[string]string{"app": "web"},
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 0, byte(i + 1)}), netip.MustParseAddr(fmt.Sprintf("fd00:a::%d", i+1))},
		}))
	}
	must(t, c.Call(t.Context(), http.MethodPost, "/api/v1/namespaces/default/services", object{
		"metadata": object{"name": "web"},
		"spec": object{
			"selector": object{"app": "web"}, "ipFamilyPolicy": "RequireDualStack", "externalIPs": []any{"198.51.100.1"},
			"ports": []any{object{"port": 80, "targetPort": 8080, "protocol": "TCP"}},
		},
	}, nil))
}

func dual(lines ...string) []string {
	for _, l := range slices.Clone(lines) {
		lines = append(lines, strings.Replace(strings.Replace(l, "10.1.0.", "fd00:a::", 1), "10.2.0.", "fd00:b::", 1))
	}
	return lines
}

// EndpointSlices are those of the real controller: of both families, and through every state of a pod.
func TestEndpointSlicesAreReal(t *testing.T) {
	c := start(t, Options{})
	web(t, c)
	all := dual("10.1.0.1:8080 n1 ready serving", "10.1.0.2:8080 n2 ready serving", "10.1.0.3:8080 n3 ready serving")
	t.Logf("the first slices came %.2f s after the Service", become(t, c, "web", all...).Seconds())

	must(t, c.SetPodReady(t.Context(), "default", "web-n2", false))
	took := become(t, c, "web", dual("10.1.0.1:8080 n1 ready serving", "10.1.0.2:8080 n2", "10.1.0.3:8080 n3 ready serving")...)
	t.Logf("a pod that is not ready was so in the slices after %v", took.Round(time.Millisecond))
	must(t, c.SetPodReady(t.Context(), "default", "web-n2", true))
	become(t, c, "web", all...)

	must(t, c.EndPod(t.Context(), "default", "web-n3", true))
	become(t, c, "web", dual("10.1.0.1:8080 n1 ready serving", "10.1.0.2:8080 n2 ready serving", "10.1.0.3:8080 n3 serving terminating")...)
	must(t, c.EndPod(t.Context(), "default", "web-n3", false))
	become(t, c, "web", dual("10.1.0.1:8080 n1 ready serving", "10.1.0.2:8080 n2 ready serving")...)

	memory, err := c.Memory()
	must(t, err)
	for name, bytes := range memory {
		t.Logf("%s: %d MB resident", name, bytes>>20)
	}
}

// Pods come of a Deployment, and go with it.
func TestDeploymentsHavePods(t *testing.T) {
	c := start(t, Options{})
	const deployments = "/apis/apps/v1/namespaces/default/deployments"
	must(t, c.Call(t.Context(), http.MethodPost, deployments, object{
		"metadata": object{"name": "web"},
		"spec": object{"replicas": 2, "selector": object{"matchLabels": object{"app": "web"}}, "template": object{
			"metadata": object{"labels": object{"app": "web"}},
			"spec":     object{"containers": []any{object{"name": "pod", "image": "none"}}},
		}},
	}, nil))
	var pods struct {
		Items []struct{ Metadata struct{ Name string } }
	}
	number := func(want int) func() error {
		return func() error {
			if err := c.Call(t.Context(), http.MethodGet, "/api/v1/namespaces/default/pods", nil, &pods); err != nil || len(pods.Items) == want {
				return err
			}
			return fmt.Errorf("there are %d", len(pods.Items))
		}
	}
	t.Logf("2 pods were there after %.2f s", eventually(t, "2 pods", patience, number(2)).Seconds())
	must(t, c.AddNode(t.Context(), "n1", nil, netip.MustParseAddr("192.0.2.1")))
	first := pods.Items[0].Metadata.Name
	must(t, c.BindPod(t.Context(), "default", first, "n1"))
	must(t, c.RunPod(t.Context(), "default", first, netip.MustParseAddr("10.1.0.1")))
	eventually(t, "one of them is ready", patience, func() error {
		var d struct{ Status struct{ ReadyReplicas int } }
		if err := c.Call(t.Context(), http.MethodGet, deployments+"/web", nil, &d); err != nil || d.Status.ReadyReplicas == 1 {
			return err
		}
		return fmt.Errorf("%d are", d.Status.ReadyReplicas)
	})
	must(t, c.Call(t.Context(), http.MethodDelete, deployments+"/web", nil, nil))
	eventually(t, "the one that runs is left to its kubelet", patience, number(1))
	must(t, c.EndPod(t.Context(), "default", first, false))
	eventually(t, "no pods", patience, number(0))
}

// A user of a kubeconfig may do what RBAC says, and nothing before.
func TestUsersMayWhatRBACSays(t *testing.T) {
	c := start(t, Options{})
	path, err := c.NewKubeconfig("system:serviceaccount:lb:ravel", "system:serviceaccounts")
	must(t, err)
	k := readKubeconfig(t, path)
	own, err := tls.X509KeyPair(k.Users[0].User.Cert, k.Users[0].User.Key)
	must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(k.Clusters[0].Cluster.CA)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{own}}}}
	defer client.CloseIdleConnections()
	get := func(path string) int {
		answer, err := client.Get(k.Clusters[0].Cluster.Server + path)
		must(t, err)
		must(t, answer.Body.Close())
		return answer.StatusCode
	}
	if got := get("/api/v1/nodes"); got != http.StatusForbidden {
		t.Fatalf("without a role: status %d", got)
	}
	const rbac = "/apis/rbac.authorization.k8s.io/v1/"
	must(t, c.Call(t.Context(), http.MethodPost, rbac+"clusterroles", object{
		"metadata": object{"name": "ravel"},
		"rules":    []any{object{"apiGroups": []any{""}, "resources": []any{"nodes"}, "verbs": []any{"list"}}},
	}, nil))
	must(t, c.Call(t.Context(), http.MethodPost, rbac+"clusterrolebindings", object{
		"metadata": object{"name": "ravel"},
		"roleRef":  object{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "ravel"},
		"subjects": []any{object{"kind": "ServiceAccount", "namespace": "lb", "name": "ravel"}},
	}, nil))
	eventually(t, "the role is known", patience, func() error {
		if got := get("/api/v1/nodes"); got != http.StatusOK {
			return fmt.Errorf("status %d", got)
		}
		return nil
	})
	if got := get("/api/v1/pods"); got != http.StatusForbidden {
		t.Errorf("what the role does not say: status %d", got)
	}
}

// The API server goes without a word and comes again with all its data.
func TestTheAPIServerComesAgain(t *testing.T) {
	c := start(t, Options{})
	web(t, c)
	become(t, c, "web", dual("10.1.0.1:8080 n1 ready serving", "10.1.0.2:8080 n2 ready serving", "10.1.0.3:8080 n3 ready serving")...)

	must(t, c.StopAPIServer())
	if err := c.Call(t.Context(), http.MethodGet, "/readyz", nil, nil); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatalf("a stopped API server: %v", err)
	}
	began := time.Now()
	must(t, c.StartAPIServer(t.Context()))
	t.Logf("it was ready again after %.1f s", time.Since(began).Seconds())
	must(t, c.StartAPIServer(t.Context()))

	must(t, c.SetPodReady(t.Context(), "default", "web-n1", false))
	took := become(t, c, "web", dual("10.1.0.1:8080 n1", "10.1.0.2:8080 n2 ready serving", "10.1.0.3:8080 n3 ready serving")...)
	t.Logf("the controllers followed %.2f s after the change", took.Seconds())

	must(t, c.RestartControllers(t.Context()))
	must(t, c.SetPodReady(t.Context(), "default", "web-n1", true))
	took = become(t, c, "web", dual("10.1.0.1:8080 n1 ready serving", "10.1.0.2:8080 n2 ready serving", "10.1.0.3:8080 n3 ready serving")...)
	t.Logf("new controllers followed %.2f s after the change", took.Seconds())
}

// A node of a fleet may be the cluster's machine: others reach it by its address, and this process by the node.
func TestInANodeOfTheFleet(t *testing.T) {
	nettest.Need(t, nettest.Root)
	topo, err := topology.Parse([]byte(`name: small
topology:
  defaults: {kind: linux, image: x, network-mode: none}
  nodes:
    k1: {exec: [ip address add 10.9.0.1/24 dev eth1]}
    d1: {exec: [ip address add 10.9.0.2/24 dev eth1]}
  links:
    - endpoints: ["k1:eth1", "d1:eth1"]
`))
	must(t, err)
	dir := t.TempDir()
	f, err := fleet.Up(t.Context(), topo, fleet.Options{LogDir: dir, Keep: []string{dir}})
	must(t, err)
	t.Cleanup(func() { must(t, f.Down()) })
	k1, d1 := f.Node("k1"), f.Node("d1")
	c := startIn(t, dir, Options{Place: k1, Addr: netip.MustParseAddr("10.9.0.1"), Port: 6443, EtcdPort: 2379})
	web(t, c)
	become(t, c, "web", dual("10.1.0.1:8080 n1 ready serving", "10.1.0.2:8080 n2 ready serving", "10.1.0.3:8080 n3 ready serving")...)
	out, err := d1.Command(t.Context(), "curl", "-sS", "--cacert", c.file("ca.crt"), c.URL()+"/livez").CombinedOutput()
	if err != nil || string(out) != "ok" {
		t.Errorf("from another node: %v: %s", err, out)
	}
	must(t, c.StopAPIServer())
	must(t, c.StartAPIServer(t.Context()))
}

func TestProxyIptables(t *testing.T) {
	nettest.Need(t, nettest.Root)
	proxy(t, "iptables", "iptables-save", "-t", "nat")
}

func TestProxyNftables(t *testing.T) {
	nettest.Need(t, nettest.NftNAT)
	proxy(t, "nftables", "nft", "list", "table", "ip", "kube-proxy")
}

func TestProxyIPVS(t *testing.T) {
	nettest.Need(t, nettest.IPVS)
	proxy(t, "ipvs", "ipvsadm", "-Sn")
}

// proxy runs the real kube-proxy in one of its modes: it sends what comes for a Service's external address to the pods,
// by what the command show prints.
func proxy(t *testing.T, mode string, show ...string) {
	c := start(t, Options{})
	web(t, c)
	config, err := c.NewKubeconfig("system:kube-proxy")
	must(t, err)
	log, err := os.Create(c.file("proxy.log"))
	must(t, err)
	defer func() { _ = log.Close() }()
	args := c.ProxyArgs("n1", mode, config)
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill(); <-ended }()
	took := eventually(t, "kube-proxy has pods of the external address", patience, func() error {
		select {
		case err := <-ended:
			ended <- err
			said, _ := os.ReadFile(log.Name())
			t.Fatalf("kube-proxy ended: %v\n%s", err, said[max(0, len(said)-1500):])
		default:
		}
		out, err := exec.Command(show[0], show[1:]...).CombinedOutput()
		for _, want := range []string{"198.51.100.1", "10.1.0.1:8080", "10.1.0.3:8080"} {
			if !strings.Contains(strings.ReplaceAll(string(out), " . ", ":"), want) {
				return fmt.Errorf("%s is not in %s (%v)", want, out, err)
			}
		}
		return nil
	})
	resident, err := (&process{cmd: cmd}).memory()
	must(t, err)
	t.Logf("kube-proxy had them after %.1f s; %d MB resident", took.Seconds(), resident>>20)
}
