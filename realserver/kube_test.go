//go:build kube

package realserver

import (
	"context"
	"fmt"
	"net/http"
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
)

type object = map[string]any

// A real kube-proxy that knows the VIPs, by externalIPs and the Service's status, and leads them to a pod elsewhere, gets
// none of their packets: Ravel's redirects do. It is so in both of its modes that this kernel has, with either variant of
// iptables on our side, also when it comes later, is started anew, and changes its rules all the time.
func TestRedirectsComeBeforeTheRealKubeProxy(t *testing.T) {
	nettest.Need(t, nettest.Root, nettest.NftNAT)
	binary, err := cluster.Build(t.Context(), "..")
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(t, 3)
	l.serve(8080)
	nettest.Shell(t, "ip addr add 192.0.2.1/32 dev lo; ip addr add 2001:db8::1/128 dev lo nodad")
	c, err := cluster.Start(t.Context(), filepath.Join(t.TempDir(), "cluster"), cluster.Options{Binary: binary})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	call := func(method, path string, in object) {
		t.Helper()
		if err := c.Call(t.Context(), method, path, in, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.AddNode(t.Context(), "n1", nil, client4, client6); err != nil { // any addresses
		t.Fatal(err)
	}
	const services, endpoints = "/api/v1/namespaces/default/services", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
	make := func(name string, port int, spec object) {
		spec["ports"] = []any{object{"name": "t", "port": port, "protocol": "TCP"}, object{"name": "u", "port": port, "protocol": "UDP"}}
		call(http.MethodPost, services, object{"metadata": object{"name": name}, "spec": spec})
	}
	slice := func(service, family string, addr any) object {
		return object{
			"metadata":    object{"name": service + "-" + strings.ToLower(family), "labels": object{"kubernetes.io/service-name": service}},
			"addressType": family, "endpoints": []any{object{"addresses": []any{addr}, "nodeName": "n2", "conditions": object{"ready": true}}},
			"ports": []any{object{"name": "t", "port": 8080, "protocol": "TCP"}, object{"name": "u", "port": 8080, "protocol": "UDP"}},
		}
	}
	make("web", 80, object{
		"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ipFamilyPolicy": "RequireDualStack", "externalIPs": []any{vip4, vip6},
	})
	call(http.MethodPatch, services+"/web/status", object{"status": object{"loadBalancer": object{"ingress": []any{object{"ip": vip4}, object{"ip": vip6}}}}})
	// kube-proxy leads to pod3, and Ravel to pod1 and pod2.
	call(http.MethodPost, endpoints, slice("web", "IPv4", pod(2, vip4)))
	call(http.MethodPost, endpoints, slice("web", "IPv6", pod(2, vip6)))
	// Another service, so that it has rules to change.
	make("busy", 81, object{})
	call(http.MethodPost, endpoints, slice("busy", "IPv4", "10.9.0.1"))
	config, err := c.NewKubeconfig("system:kube-proxy")
	if err != nil {
		t.Fatal(err)
	}

	keys := []ravel.ServiceKey{{VIP: vip4, Proto: ravel.TCP, Port: 80}, {VIP: vip4, Proto: ravel.UDP, Port: 80},
		{VIP: vip6, Proto: ravel.TCP, Port: 80}, {VIP: vip6, Proto: ravel.UDP, Port: 80}}
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
				args := c.ProxyArgs("n1", mode, config)
				var log *os.File
				start := func() (stop func()) {
					t.Helper()
					var err error
					if log, err = os.Create(filepath.Join(t.TempDir(), "proxy.log")); err != nil {
						t.Fatal(err)
					}
					cmd := exec.Command(args[0], args[1:]...)
					cmd.Stdout, cmd.Stderr = log, log
					if err := cmd.Start(); err != nil {
						t.Fatal(err)
					}
					return func() { _ = cmd.Process.Kill(); _ = cmd.Wait(); _ = log.Close() }
				}
				who := func(key ravel.ServiceKey) string {
					flushFlows(t)
					pod, _, _, err := ask(key)
					if err != nil {
						return err.Error()
					}
					return pod
				}
				all := func(when string) {
					t.Helper()
					for _, key := range keys {
						for range 5 {
							if pod := who(key); pod != "pod1" && pod != "pod2" {
								t.Errorf("%s: %s answered for %s", when, pod, key)
							}
						}
					}
				}
				// As the loop of a realserver does, once a second and when it finds something to mend.
				look := func() {
					if r.Look(t.Context()) {
						apply(t, r, redirectsTo(keys, 0, 1)...)
					}
				}
				stop := start()
				t.Cleanup(func() {
					stop()
					if out, err := exec.Command(args[0], append(args[1:], "--cleanup")...).CombinedOutput(); err != nil {
						t.Logf("kube-proxy --cleanup: %v: %s", err, out)
					}
				})
				eventually(t, func() error { // without us it takes them
					for _, key := range keys {
						if pod := who(key); pod != "pod3" {
							said, _ := os.ReadFile(log.Name())
							return fmt.Errorf("%s answered for %s; kube-proxy says %s", pod, key, said[max(0, len(said)-500):])
						}
					}
					return nil
				})
				apply(t, r, redirectsTo(keys, 0, 1)...)
				all("beside kube-proxy")
				for n := range 3 {
					stop()
					stop = start()
					for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Second) {
						look()
					}
					all(fmt.Sprintf("started anew %d", n+1))
				}
				for n := range 10 {
					change := slice("busy", "IPv4", fmt.Sprintf("10.9.%d.1", n+1))
					call(http.MethodPut, endpoints+"/busy-ipv4", change)
					apply(t, r, redirectsTo(keys, n%2)...)
					apply(t, r, redirectsTo(keys, 0, 1)...)
					all(fmt.Sprintf("both changed %d", n+1))
				}
			})
		}
	}
}

// redirectsTo makes a redirect of each key to pods by their numbers.
func redirectsTo(keys []ravel.ServiceKey, pods ...int) (list []ravel.Redirect) {
	for _, k := range keys {
		list = append(list, redirect(k.Proto, k.VIP, k.Port, pods...))
	}
	return list
}
