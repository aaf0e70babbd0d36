//go:build kube

package guard

import (
	"errors"
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

// elsewhere is where kube-proxy's rules lead.
const elsewhere = 3333

// On a director a real kube-proxy that knows a VIP, and leads it elsewhere, gets none of the packets of services: they
// reach this host's LOCAL_IN, where IPVS takes them. So it is in its modes nftables and iptables, with either variant of
// iptables on our side, and when kube-proxy is started anew. (The lab's fleet has modes iptables and ipvs beside IPVS
// itself, whose kernel has no NAT by nf_tables.)
func TestTheRealKubeProxyTakesNoClaimedPackets(t *testing.T) {
	nettest.Need(t, nettest.Root, nettest.NftNAT, nettest.IPSet)
	c := clustertest.Start(t, "../..", cluster.Options{})
	client := wire(t)
	must(t, c.AddNode(t.Context(), "n1", nil, hosts...))
	call := func(method, path string, in object) {
		t.Helper()
		must(t, c.Call(t.Context(), method, path, in, nil))
	}
	ports := func(number int) []any {
		return []any{object{"name": "t", "port": number, "protocol": "TCP"}, object{"name": "u", "port": number, "protocol": "UDP"}}
	}
	const services = "/api/v1/namespaces/default/services"
	call(http.MethodPost, services, object{"metadata": object{"name": "web"}, "spec": object{
		"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ipFamilyPolicy": "RequireDualStack",
		"externalIPs": []any{vips[0], vips[1]}, "ports": ports(port),
	}})
	call(http.MethodPatch, services+"/web/status", object{"status": object{
		"loadBalancer": object{"ingress": []any{object{"ip": vips[0]}, object{"ip": vips[1]}}},
	}})
	for i, family := range []string{"IPv4", "IPv6"} {
		call(http.MethodPost, "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", object{
			"metadata":    object{"name": "web-" + strings.ToLower(family), "labels": object{"kubernetes.io/service-name": "web"}},
			"addressType": family, "ports": ports(elsewhere),
			"endpoints": []any{object{"addresses": []any{hosts[i]}, "nodeName": "n1", "conditions": object{"ready": true}}},
		})
	}
	config, err := c.NewKubeconfig("system:kube-proxy")
	must(t, err)
	here := listen(t, vips...)
	there := listenAt(t, elsewhere, hosts...)

	// In mode iptables it takes the variant that the host has chosen, and Ravel's is the same.
	own, err := iptables.Detect(t.Context())
	must(t, err)
	for mode, variants := range map[string][]iptables.Variant{"nftables": {iptables.NFT, iptables.Legacy}, "iptables": {own}} {
		for _, v := range variants {
			t.Run(mode+" beside "+string(v), func(t *testing.T) {
				args := c.ProxyArgs("n1", mode, config)
				log := filepath.Join(t.TempDir(), "proxy.log")
				start := func() (stop func()) {
					file, err := os.Create(log)
					must(t, err)
					cmd := exec.Command(args[0], args[1:]...)
					cmd.Stdout, cmd.Stderr = file, file
					must(t, cmd.Start())
					return func() { _ = cmd.Process.Kill(); _ = cmd.Wait(); _ = file.Close() }
				}
				// goes tells how many of the packets of a family and protocol came here, and how many there.
				goes := func(vip netip.Addr, proto string) (int64, int64, error) {
					nettest.Shell(t, "conntrack -F 2>/dev/null; conntrack -F -f ipv6 2>/dev/null; true")
					h, e := here.Load(), there.Load()
					var err error
					in(t, client, func() { err = ask(proto, vip, port) })
					time.Sleep(10 * time.Millisecond) // a listener counts after the client knows
					return here.Load() - h, there.Load() - e, err
				}
				all := func(when string, wantHere, wantThere int64) error {
					var errs []error
					for _, vip := range vips {
						for _, proto := range []string{"tcp", "udp"} {
							if h, e, err := goes(vip, proto); h != wantHere || e != wantThere || err != nil {
								errs = append(errs, fmt.Errorf("%s: %s to %s: %d came to the VIP and %d were led elsewhere, %v", when, proto, vip, h, e, err))
							}
						}
					}
					return errors.Join(errs...)
				}
				stop := start()
				t.Cleanup(func() {
					stop()
					if out, err := exec.Command(args[0], append(args[1:], "--cleanup")...).CombinedOutput(); err != nil {
						t.Logf("kube-proxy --cleanup: %v: %s", err, out)
					}
				})
				var err error
				for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
					if err = all("without us", 0, 1); err == nil {
						break
					}
				}
				if err != nil {
					said, _ := os.ReadFile(log)
					t.Fatalf("%v\nkube-proxy says %s", err, said[max(0, len(said)-1000):])
				}
				g := New(Options{Tables: open(t, v), Enabled: true, Untrack: true})
				var claims []ravel.ServiceKey
				for _, vip := range vips {
					claims = append(claims, key(ravel.TCP, vip, port), key(ravel.UDP, vip, port))
				}
				_, err = g.Apply(t.Context(), vips, claims, nil)
				must(t, err)
				must(t, all("claimed", 1, 0))
				for range 2 {
					stop()
					stop = start()
					for end := time.Now().Add(4 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
						must(t, all("kube-proxy is started anew", 1, 0))
					}
				}
				_, err = g.Apply(t.Context(), nil, nil, nil)
				must(t, err)
				must(t, all("claimed no more", 0, 1))
			})
		}
	}
}
