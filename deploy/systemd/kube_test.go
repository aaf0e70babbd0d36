//go:build kube

package systemd_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
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

	"sigs.k8s.io/yaml"

	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/lab/cluster"
	"github.com/ravel-lb/ravel/lab/cluster/clustertest"
)

type object = map[string]any

// A director that is no node follows a cluster with the account, the kubeconfig and the settings that are here.
func TestADirectorOutsideOfTheCluster(t *testing.T) {
	nettest.Need(t, nettest.Root, nettest.IPVS, nettest.Dummy, nettest.IPSet)
	c := clustertest.Start(t, "../..", cluster.Options{Controllers: append(slices.Clone(cluster.DefaultControllers), cluster.TokenController)})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	call := func(method, path string, in, out any) {
		t.Helper()
		must(c.Call(t.Context(), method, path, in, out))
	}
	call(http.MethodPost, "/api/v1/namespaces", object{"metadata": object{"name": "lb"}}, nil)
	apply(t, c)

	// The cluster: two nodes with a pod each, and the documents, which name the director.
	call(http.MethodPost, "/api/v1/namespaces/lb/configmaps", object{"metadata": object{"name": "ravel"}, "data": object{
		"cluster.json": `{"config": {"192.0.2.80": {"80": {"namespace": "default", "service": "web", "portName": "p", "tcpEnabled": true}}}, "config6": {}}`,
		"fleet.yaml":   "asn: 65100\ndirectors:\n- {name: director1, addresses: [10.9.0.1]}\npeers:\n- {address: 10.9.0.254, asn: 65000}\n",
	}}, nil)
	call(http.MethodPost, "/api/v1/namespaces/default/services", object{"metadata": object{"name": "web"}, "spec": object{
		"selector": object{"app": "web"}, "ports": []any{object{"name": "p", "port": 80, "targetPort": 8080}},
	}}, nil)
	for i := range byte(2) {
		node := fmt.Sprintf("r%d", i+1)
		must(c.AddNode(t.Context(), node, nil, netip.AddrFrom4([4]byte{10, 9, 0, 31 + i})))
		must(c.AddPod(t.Context(), cluster.Pod{
			Namespace: "default", Name: "web-" + node, Node: node, Labels: map[string]string{"app": "web"},
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 4, i, 10})},
		}))
	}

	// The kubeconfig is made as docs/systemd.md says.
	dir := t.TempDir()
	var secret struct {
		Data map[string][]byte `json:"data"`
	}
	for deadline := time.Now().Add(time.Minute); len(secret.Data["token"]) == 0; time.Sleep(50 * time.Millisecond) {
		call(http.MethodGet, "/api/v1/namespaces/lb/secrets/ravel-outside", nil, &secret)
		if time.Now().After(deadline) {
			t.Fatal("the Secret has no token")
		}
	}
	must(os.WriteFile(filepath.Join(dir, "token"), secret.Data["token"], 0o600))
	must(os.WriteFile(filepath.Join(dir, "ca.crt"), secret.Data["ca.crt"], 0o600))
	key := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("k"), 32))
	must(os.WriteFile(filepath.Join(dir, "gossip.key"), []byte(key+"\n"), 0o600))
	for _, name := range []string{"kubeconfig", "director.yaml"} {
		text, err := os.ReadFile(name)
		must(err)
		here := strings.NewReplacer("/etc/ravel", dir, "https://192.0.2.10:6443", c.URL()).Replace(string(text))
		must(os.WriteFile(filepath.Join(dir, name), []byte(here), 0o600))
	}

	nettest.Shell(t, "ip link add uplink type dummy; ip address add 10.9.0.1/24 dev uplink; ip link set uplink up; ip route add default via 10.9.0.254")
	log := filepath.Join(dir, "log")
	file, err := os.Create(log)
	must(err)
	cmd := exec.Command(program, "director", "--config", filepath.Join(dir, "director.yaml"), "--state-dir", filepath.Join(dir, "state"),
		"--settle", "200ms", "--rise", "100ms", "--probe", "off")
	cmd.Stdout, cmd.Stderr = file, file
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(cmd.Start())
	t.Cleanup(func() {
		err := errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait(), file.Close())
		said, _ := os.ReadFile(log)
		if err != nil || t.Failed() {
			t.Errorf("%v; the director said\n%s", err, said)
		}
		if strings.Contains(string(said), "orbidden") {
			t.Errorf("it may not do all that it does:\n%s", said)
		}
	})
	serves := func(when string, reals ...string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
			var got []string
			for line := range strings.Lines(nettest.Run(t, "ipvsadm", "-Sn")) {
				if f := strings.Fields(line); f[0] == "-a" && f[len(f)-1] != "0" {
					got = append(got, strings.Split(f[4], ":")[0])
				}
			}
			if slices.Sort(got); slices.Equal(got, reals) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: new flows go to %v, want %v", when, got, reals)
			}
		}
	}
	serves("at the start", "10.9.0.31", "10.9.0.32")
	must(c.SetPodReady(t.Context(), "default", "web-r2", false))
	serves("a pod is not ready", "10.9.0.31")
	must(c.SetPodReady(t.Context(), "default", "web-r2", true))
	serves("it is again", "10.9.0.31", "10.9.0.32")

	// A broken document becomes an Event.
	call(http.MethodPatch, "/api/v1/namespaces/lb/configmaps/ravel", object{"data": object{"cluster.json": "{"}}, nil)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		var events struct {
			Items []struct {
				InvolvedObject struct{ Kind, Name string }
			}
		}
		call(http.MethodGet, "/api/v1/namespaces/lb/events", nil, &events)
		if len(events.Items) > 0 && events.Items[0].InvolvedObject.Name == "ravel" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("there is no Event of the broken document")
		}
	}
	serves("with a broken document", "10.9.0.31", "10.9.0.32")

	may(t, c.URL(), secret.Data["ca.crt"], string(secret.Data["token"]))
}

// apply makes what rbac.yaml has.
func apply(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	text, err := os.ReadFile("rbac.yaml")
	if err != nil {
		t.Fatal(err)
	}
	const rbac = "/apis/rbac.authorization.k8s.io/v1"
	paths := map[string]string{
		"ServiceAccount": "/api/v1/namespaces/lb/serviceaccounts", "Secret": "/api/v1/namespaces/lb/secrets",
		"ClusterRole": rbac + "/clusterroles", "ClusterRoleBinding": rbac + "/clusterrolebindings",
		"Role": rbac + "/namespaces/lb/roles", "RoleBinding": rbac + "/namespaces/lb/rolebindings",
	}
	for part := range strings.SplitSeq(string(text), "\n---\n") {
		var o object
		if err := yaml.Unmarshal([]byte(part), &o); err != nil {
			t.Fatal(err)
		}
		kind, _ := o["kind"].(string)
		if err := c.Call(t.Context(), http.MethodPost, paths[kind], o, nil); err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
	}
}

// may asks the API server as the account of the token, for what it may and for what it may not.
func may(t *testing.T, server string, authority []byte, token string) {
	t.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authority) {
		t.Fatal("the Secret has no CA")
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	defer client.CloseIdleConnections()
	for path, want := range map[string]int{
		"/api/v1/nodes":    http.StatusOK,
		"/api/v1/services": http.StatusOK,
		"/apis/discovery.k8s.io/v1/endpointslices":                             http.StatusOK,
		"/api/v1/namespaces/lb/configmaps?fieldSelector=metadata.name%3Dravel": http.StatusOK,
		"/api/v1/namespaces/lb/configmaps?fieldSelector=metadata.name%3Dother": http.StatusForbidden,
		"/api/v1/namespaces/lb/configmaps/ravel":                               http.StatusForbidden,
		"/api/v1/namespaces/lb/configmaps/other":                               http.StatusForbidden,
		"/api/v1/namespaces/lb/configmaps":                                     http.StatusForbidden,
		"/api/v1/namespaces/lb/secrets":                                        http.StatusForbidden,
		"/api/v1/namespaces/lb/secrets/ravel-outside":                          http.StatusForbidden,
		"/api/v1/namespaces/lb/events":                                         http.StatusForbidden,
		"/api/v1/namespaces/default/configmaps/ravel":                          http.StatusForbidden,
		"/api/v1/nodes/r1":                                                     http.StatusForbidden,
		"/api/v1/pods":                                                         http.StatusForbidden,
		"/apis/rbac.authorization.k8s.io/v1/clusterroles":                      http.StatusForbidden,
		"/apis/apps/v1/namespaces/default/deployments":                         http.StatusForbidden,
		"/api/v1/namespaces/default/services/web":                              http.StatusForbidden,
	} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(token))
		answer, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		said, err := io.ReadAll(answer.Body)
		if answer.StatusCode != want || errors.Join(err, answer.Body.Close()) != nil {
			t.Errorf("GET %s: %s, want %d: %s", path, answer.Status, want, said)
		}
	}
}
