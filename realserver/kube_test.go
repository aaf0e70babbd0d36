//go:build kube

package realserver

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/lab/cluster"
	"github.com/ravel-lb/ravel/lab/cluster/clustertest"
)

type object = map[string]any

// kubeCluster is a control plane with a node n1, and what the tests ask of it.
type kubeCluster struct {
	*cluster.Cluster
	t      *testing.T
	config string // kube-proxy's kubeconfig
}

const services, endpoints = "/api/v1/namespaces/default/services", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"

func startCluster(t *testing.T) kubeCluster {
	t.Helper()
	c := clustertest.Start(t, "..", cluster.Options{})
	k := kubeCluster{Cluster: c, t: t}
	err := c.AddNode(t.Context(), "n1", nil, client4, client6) // any addresses
	if err != nil {
		t.Fatal(err)
	}
	if k.config, err = c.NewKubeconfig("system:kube-proxy"); err != nil {
		t.Fatal(err)
	}
	return k
}

func (k kubeCluster) call(method, path string, in object) {
	k.t.Helper()
	var body any
	if in != nil {
		body = in
	}
	if err := k.Call(k.t.Context(), method, path, body, nil); err != nil {
		k.t.Fatal(err)
	}
}

// service makes a Service with a port by TCP and UDP.
func (k kubeCluster) service(name string, port int, spec object) {
	k.t.Helper()
	spec["ports"] = []any{object{"name": "t", "port": port, "protocol": "TCP"}, object{"name": "u", "port": port, "protocol": "UDP"}}
	k.call(http.MethodPost, services, object{"metadata": object{"name": name}, "spec": spec})
}

// external is the spec of a Service that knows the VIPs.
func external() object {
	return object{"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ipFamilyPolicy": "RequireDualStack", "externalIPs": []any{vip4, vip6}}
}

// slice is an EndpointSlice with pods on a node.
func slice(service, family, node string, addrs ...any) object {
	var list []any
	for _, a := range addrs {
		list = append(list, object{"addresses": []any{a}, "nodeName": node, "conditions": object{"ready": true}})
	}
	return object{
		"metadata":    object{"name": service + "-" + strings.ToLower(family), "labels": object{"kubernetes.io/service-name": service}},
		"addressType": family, "endpoints": list,
		"ports": []any{object{"name": "t", "port": 8080, "protocol": "TCP"}, object{"name": "u", "port": 8080, "protocol": "UDP"}},
	}
}

// proxy starts a kube-proxy that ends by stop, or with the test, and says what it says.
func (k kubeCluster) proxy(t *testing.T, mode string) (stop func(), says func() string) {
	t.Helper()
	args := k.ProxyArgs("n1", mode, k.config)
	log, err := os.Create(filepath.Join(t.TempDir(), "proxy.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = func() { _ = cmd.Process.Kill(); _ = cmd.Wait(); _ = log.Close() }
	t.Cleanup(func() {
		stop()
		if out, err := exec.Command(args[0], append(args[1:], "--cleanup")...).CombinedOutput(); err != nil {
			t.Logf("kube-proxy --cleanup: %v: %s", err, out)
		}
	})
	return stop, func() string {
		text, _ := os.ReadFile(log.Name())
		return string(text)
	}
}

// who asks once from a new flow.
func who(t *testing.T, key ravel.ServiceKey) string {
	t.Helper()
	flushFlows(t)
	pod, _, _, err := ask(key)
	if err != nil {
		return err.Error()
	}
	return pod
}

var kubeKeys = []ravel.ServiceKey{
	{VIP: vip4, Proto: ravel.TCP, Port: 80}, {VIP: vip4, Proto: ravel.UDP, Port: 80},
	{VIP: vip6, Proto: ravel.TCP, Port: 80}, {VIP: vip6, Proto: ravel.UDP, Port: 80},
}

// A real kube-proxy that knows the VIPs, by externalIPs and the Service's status, and leads them to a pod elsewhere, gets
// none of their packets: Ravel's redirects do. It is so in both of its modes that this kernel has, with either variant of
// iptables on our side, also when it comes later, is started anew, and changes its rules all the time.
func TestRedirectsComeBeforeTheRealKubeProxy(t *testing.T) {
	nettest.Need(t, nettest.Root, nettest.NftNAT)
	k := startCluster(t)
	l := newLab(t, 3)
	l.serve(8080)
	nettest.Shell(t, "ip addr add 192.0.2.1/32 dev lo; ip addr add 2001:db8::1/128 dev lo nodad")
	t.Cleanup(func() { nettest.Shell(t, "ip addr del 192.0.2.1/32 dev lo; ip addr del 2001:db8::1/128 dev lo") })
	k.service("web", 80, external())
	k.call(http.MethodPatch, services+"/web/status", object{"status": object{"loadBalancer": object{"ingress": []any{object{"ip": vip4}, object{"ip": vip6}}}}})
	// kube-proxy leads to pod3, and Ravel to pod1 and pod2.
	k.call(http.MethodPost, endpoints, slice("web", "IPv4", "n2", pod(2, vip4)))
	k.call(http.MethodPost, endpoints, slice("web", "IPv6", "n2", pod(2, vip6)))
	// Another service, so that it has rules to change.
	k.service("busy", 81, object{})
	k.call(http.MethodPost, endpoints, slice("busy", "IPv4", "n2", "10.9.0.1"))

	// In mode iptables it takes the variant that the host has chosen, and Ravel's is the same.
	own, err := iptables.Detect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for mode, variants := range map[string][]iptables.Variant{"nftables": {iptables.NFT, iptables.Legacy}, "iptables": {own}} {
		for _, v := range variants {
			t.Run(mode+" beside "+string(v), func(t *testing.T) {
				flush(t, v)
				r := newReal(t, v, nil)
				t.Cleanup(func() {
					if _, err := r.Cleanup(context.Background(), false); err != nil {
						t.Error(err)
					}
					flush(t, v)
				})
				all := func(when string) {
					t.Helper()
					for _, key := range kubeKeys {
						for range 5 {
							if pod := who(t, key); pod != "pod1" && pod != "pod2" {
								t.Errorf("%s: %s answered for %s", when, pod, key)
							}
						}
					}
				}
				// As the loop of a realserver does, once a second and when it finds something to mend.
				look := func() {
					if r.Look(t.Context()) {
						apply(t, r, redirectsTo(kubeKeys, 0, 1)...)
					}
				}
				stop, says := k.proxy(t, mode)
				eventually(t, func() error { // without us it takes them
					for _, key := range kubeKeys {
						if pod := who(t, key); pod != "pod3" {
							said := says()
							return fmt.Errorf("%s answered for %s; kube-proxy says %s", pod, key, said[max(0, len(said)-500):])
						}
					}
					return nil
				})
				apply(t, r, redirectsTo(kubeKeys, 0, 1)...)
				all("beside kube-proxy")
				for n := range 3 {
					stop()
					stop, _ = k.proxy(t, mode)
					for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Second) {
						look()
					}
					all(fmt.Sprintf("started anew %d", n+1))
				}
				for n := range 10 {
					k.call(http.MethodPut, endpoints+"/busy-ipv4", slice("busy", "IPv4", "n2", fmt.Sprintf("10.9.%d.1", n+1)))
					apply(t, r, redirectsTo(kubeKeys, n%2)...)
					apply(t, r, redirectsTo(kubeKeys, 0, 1)...)
					all(fmt.Sprintf("both changed %d", n+1))
				}
			})
		}
	}
}

// With --redirect=kube-service the Service's own chain picks the pod, where kube-proxy has one for the VIP: so its session
// affinity holds. Where it has none, as before the Service knows the VIP and after it is gone, Ravel's own rules do. kube-proxy
// is never kept from changing its rules by that.
func TestTheServicesOwnChainPicks(t *testing.T) {
	nettest.Need(t, nettest.Root, nettest.NftNAT)
	k := startCluster(t)
	l := newLab(t, 3)
	l.serve(8080)
	nettest.Shell(t, "ip addr add 192.0.2.1/32 dev lo; ip addr add 2001:db8::1/128 dev lo nodad")
	t.Cleanup(func() { nettest.Shell(t, "ip addr del 192.0.2.1/32 dev lo; ip addr del 2001:db8::1/128 dev lo") })
	v, err := iptables.Detect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	flush(t, v)
	r := newReal(t, v, func(o *Options) { o.ThroughKubeProxy = true })
	t.Cleanup(func() {
		if _, err := r.Cleanup(context.Background(), false); err != nil {
			t.Error(err)
		}
		flush(t, v)
	})
	// pods counts who answers for each key: pod1 and pod2 are on this node, and Ravel's; pod3 is not.
	pods := func() map[string]int {
		count := map[string]int{}
		for _, key := range kubeKeys {
			here := map[string]bool{}
			for range 12 {
				here[who(t, key)] = true
			}
			for pod := range here {
				count[pod]++
			}
		}
		return count
	}
	all := redirectsTo(kubeKeys, 0, 1)
	apply(t, r, all...)
	if p := r.Problems(); len(p) == 0 || !strings.Contains(p[0].What, "no kube-proxy in mode iptables") {
		t.Errorf("without kube-proxy: problems %v", p)
	}
	if got := pods(); got["pod1"] != 4 || got["pod2"] != 4 || len(got) != 2 {
		t.Errorf("without kube-proxy: %v answered", got)
	}

	// A Service that prefers this node's pods, with affinity; its third pod is elsewhere.
	spec := external()
	spec["sessionAffinity"], spec["externalTrafficPolicy"] = "ClientIP", "Local"
	k.service("web", 80, spec)
	for _, family := range []struct {
		name string
		vip  netip.Addr
	}{{"IPv4", vip4}, {"IPv6", vip6}} {
		both := slice("web", family.name, "n1", pod(0, family.vip), pod(1, family.vip))
		both["endpoints"] = append(both["endpoints"].([]any), slice("", "", "n2", pod(2, family.vip))["endpoints"].([]any)...)
		k.call(http.MethodPost, endpoints, both)
	}
	_, says := k.proxy(t, "iptables")
	eventually(t, func() error {
		r.Resync()
		apply(t, r, all...)
		if got := pods(); got["pod1"]+got["pod2"] != 4 || len(r.Problems()) > 0 {
			return fmt.Errorf("%v answered, problems %v", got, r.Problems())
		}
		return nil
	})
	for range 3 {
		if got := pods(); got["pod1"]+got["pod2"] != 4 || got["pod3"] > 0 { // one pod for each key
			t.Errorf("with affinity: %v answered", got)
		}
	}
	if p := r.Problems(); len(p) > 0 {
		t.Errorf("problems %v", p)
	}

	// Its pods go and come, and it goes: kube-proxy deletes its chains, and goes on to change what else it has to.
	k.call(http.MethodPut, endpoints+"/web-ipv4", slice("web", "IPv4", "n1"))
	k.call(http.MethodPut, endpoints+"/web-ipv6", slice("web", "IPv6", "n1"))
	k.call(http.MethodDelete, services+"/web", nil)
	k.service("other", 81, object{"clusterIP": "10.96.7.7"})
	k.call(http.MethodPost, endpoints, slice("other", "IPv4", "n2", "10.9.0.1"))
	eventually(t, func() error {
		rules := nettest.Run(t, "iptables-save", "-t", "nat")
		if !strings.Contains(rules, "10.96.7.7") || strings.Contains(rules, "default/web") && strings.Contains(rules, "KUBE-SVL-") {
			return fmt.Errorf("kube-proxy has not gone on: %s", rules)
		}
		return nil
	})
	if got := pods(); got["pod1"] != 4 || got["pod2"] != 4 || len(got) != 2 {
		t.Errorf("the Service is gone: %v answered", got)
	}
	if said := says(); strings.Contains(said, "Failed to execute iptables-restore") || strings.Contains(said, "Sync failed") {
		t.Errorf("kube-proxy could not write its rules: %s", said)
	}
	apply(t, r, redirectsTo(kubeKeys, 0)...)
	if got := pods(); got["pod1"] != 4 || len(got) != 1 {
		t.Errorf("one pod is left: %v answered", got)
	}
}

// redirectsTo makes a redirect of each key to pods by their numbers.
func redirectsTo(keys []ravel.ServiceKey, pods ...int) (list []ravel.Redirect) {
	for _, k := range keys {
		list = append(list, redirect(k.Proto, k.VIP, k.Port, pods...))
	}
	return list
}
