//go:build kube

package e2e

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/lab/cluster"
	"github.com/ravel-lb/ravel/lab/stage"
)

// badDocuments are 20 ways to break the ConfigMap: in the key, old is replaced by new, or all of it where old is empty.
var badDocuments = []struct{ name, key, old, new, place string }{
	{"it ends too early", clusterKey, `"config6"`, "", "key cluster.json: cluster: syntax error"},
	{"it is empty", clusterKey, "", "", "key cluster.json: cluster: is empty"},
	{"it is no document", clusterKey, "", "hello", `key cluster.json: cluster: want a mapping, got the string "hello"`},
	{"it is a list", clusterKey, "", "[]", "key cluster.json: cluster: want a mapping, got a list"},
	{"it is null", clusterKey, "", "null", "key cluster.json: cluster: is nothing"},
	{"a VIP that is no address", clusterKey, "198.51.100.20", "198.51.100.020", `cluster.config["198.51.100.020"]: "198.51.100.020" is no IP address`},
	{"a VIP of the other family", clusterKey, "198.51.100.20", "2001:db8::1", `cluster.config["2001:db8::1"]: 2001:db8::1 is an IPv6 address`},
	{"a multicast VIP", clusterKey, "198.51.100.20", "224.0.0.1", `cluster.config["224.0.0.1"]: 224.0.0.1 is a multicast address`},
	{"port 0", clusterKey, `"80"`, `"0"`, `cluster.config["198.51.100.20"]["0"]: port 0`},
	{"port 70000", clusterKey, `"80"`, `"70000"`, `cluster.config["198.51.100.20"]["70000"]: port 70000`},
	{"a port by name", clusterKey, `"80"`, `"http"`, `cluster.config["198.51.100.20"].http: port http`},
	{"a key given twice", clusterKey, `{"config":`, `{"config":{},"config":`, "cluster.config: given twice"},
	{"a VIP given twice", clusterKey, `"2001:db8:77::20":`, `"2001:db8:77::20":{},"2001:DB8:77::20":`, `is the same VIP as cluster.config6["2001:db8:77::20"]`},
	{"a namespace that is a number", clusterKey, `"namespace":"shop"`, `"namespace":7`, `cluster.config["198.51.100.20"]["80"].namespace: want a string`},
	{"no name of a service", clusterKey, `"service":"web"`, `"service":""`, `cluster.config["198.51.100.20"]["80"].service: name ""`},
	{"a word where true or false is wanted", clusterKey, `"tcpEnabled":true`, `"tcpEnabled":"yes"`, `cluster.config["198.51.100.20"]["80"].tcpEnabled: want true or false`},
	{"labels that are a word", clusterKey, `{"config":`, `{"labels":"blue","config":`, "cluster.labels: want a mapping"},
	{"an MTU that no packet has", clusterKey, `{"config":`, `{"mtuConfig":{"198.51.100.20":"100"},"config":`, `cluster.mtuConfig["198.51.100.20"]: MTU 100`},
	{"a fleet document with a router without an address", fleetKey, "address: 10.1.0.2", "address: tor1", `key fleet.yaml: fleet.peers[0].address: "tor1" is no IP address`},
	{"a fleet document with an unknown key", fleetKey, "asn: 65100", "asn: 65100\nholdtime: 3s", "key fleet.yaml: fleet.holdtime: unknown key"},
}

// Whatever becomes of the ConfigMap, traffic goes on and endpoints are followed; an Event on it and `ravel check` name the
// place.
func TestABadConfigMapBreaksNothing(t *testing.T) {
	s, c, k := clusterFleet(t)
	explain(t, s)
	load := startLoad(t, s)
	clusterText, fleetText := shared.first.ConfigMap()
	good := func() object { return object{clusterKey: string(clusterText), fleetKey: string(fleetText)} }
	nodes := []string{"d1", "d3", "r1", "r4"}
	named := func(t *testing.T, place string) {
		t.Helper()
		for _, node := range nodes {
			eventually(t, 30*time.Second, func() error {
				out, err := s.Ravel(t.Context(), node, "check")
				if code, err := exitCode(err); err != nil || code != 1 || !strings.Contains(out, place) {
					return fmt.Errorf("%s: ravel check: exit code %d, %w, does not name %q:\n%s", node, code, err, place, out)
				}
				return nil
			})
		}
		eventually(t, 30*time.Second, func() error { return hasEvent(t, c, place) })
	}
	if len(badDocuments) != 20 {
		t.Errorf("%d ways, want 20", len(badDocuments))
	}
	for i, b := range badDocuments {
		t.Run(b.name, func(t *testing.T) {
			data := good()
			data[b.key] = b.new
			if b.old != "" {
				data[b.key] = string(spoil(t, good()[b.key].(string), b.old, b.new))
			}
			must(t, setConfigMap(t.Context(), c, data))
			named(t, b.place)
			if i == 5 { // the document is bad, and pods come and go
				for _, n := range []int{replicas + 1, replicas} {
					must(t, c.Call(t.Context(), http.MethodPatch, deployments+"/web", object{"spec": object{"replicas": n}}, nil))
					k.settled(t, n)
					taking(t, s, k)
				}
			}
			load.unbroken(t, b.name)
		})
	}
	t.Run("its key is gone", func(t *testing.T) {
		must(t, setConfigMap(t.Context(), c, object{fleetKey: string(fleetText), "other": "x"}))
		named(t, "key cluster.json")
		load.unbroken(t, "without its key")
	})
	t.Run("it is binary", func(t *testing.T) {
		must(t, c.Call(t.Context(), http.MethodPut, configMaps+"/"+configName, object{
			"metadata": object{"name": configName}, "data": object{fleetKey: string(fleetText)},
			"binaryData": object{clusterKey: base64.StdEncoding.EncodeToString([]byte{0xff, 0xfe, 0})},
		}, nil))
		named(t, "is under binaryData")
		load.unbroken(t, "binary")
	})
	t.Run("it is deleted", func(t *testing.T) {
		must(t, c.Call(t.Context(), http.MethodDelete, configMaps+"/"+configName, nil, nil))
		named(t, "is not there")
		for _, node := range []string{"d1", "r1"} {
			must(t, s.Process(node).Kill())
			must(t, s.Start(node))
		}
		must(t, s.WaitHops(within(t, time.Minute), stage.Routers(), vips, len(s.Directors())))
		load.unbroken(t, "deleted, and a director and an agent restarted")
	})
	must(t, setConfigMap(t.Context(), c, good()))
	for _, node := range nodes {
		eventually(t, 30*time.Second, func() error {
			out, err := s.Ravel(t.Context(), node, "check")
			if err != nil {
				err = fmt.Errorf("%s: the document is good again: %w\n%s", node, err, out)
			}
			return err
		})
	}
	load.unbroken(t, "good again")
	load.stop(t)
}

// hasEvent returns nil if an Event on the ConfigMap says something.
func hasEvent(t *testing.T, c *cluster.Cluster, words string) error {
	var events struct {
		Items []struct {
			InvolvedObject struct{ Kind, Name string }
			Message        string
		}
	}
	if err := c.Call(t.Context(), http.MethodGet, "/api/v1/namespaces/"+configNamespace+"/events", nil, &events); err != nil {
		return err
	}
	for _, e := range events.Items {
		if e.InvolvedObject.Kind == "ConfigMap" && e.InvolvedObject.Name == configName && strings.Contains(e.Message, words) {
			return nil
		}
	}
	return fmt.Errorf("none of %d Events says %q", len(events.Items), words)
}

// A document that takes everything away is good, and held by all of the fleet until somebody accepts it; meanwhile pods are
// followed.
func TestAnEmptiedConfigMapIsHeld(t *testing.T) {
	share := []string{"--blast-radius", "50"}
	s, c, k := clusterFleetWith(t, share, share)
	explain(t, s)
	load := startLoad(t, s)
	_, fleetText := shared.first.ConfigMap()
	must(t, setConfigMap(t.Context(), c, object{clusterKey: `{"config":{},"config6":{}}`, fleetKey: string(fleetText)}))
	for _, node := range append(s.Directors(), s.Realservers()...) {
		eventually(t, 30*time.Second, func() error {
			out, err := s.Ravel(t.Context(), node, "check")
			if code, err := exitCode(err); err != nil || code != 1 || !strings.Contains(out, "ravel accept") {
				return fmt.Errorf("%s: ravel check: exit code %d, %w:\n%s", node, code, err, out)
			}
			return nil
		})
	}
	load.unbroken(t, "held")
	for _, n := range []int{replicas + 2, replicas} {
		must(t, c.Call(t.Context(), http.MethodPatch, deployments+"/web", object{"spec": object{"replicas": n}}, nil))
		k.settled(t, n)
		taking(t, s, k)
		load.unbroken(t, fmt.Sprintf("held, and scaled to %d", n))
	}
	load.stop(t)
	ravelSays(t, s, "r2", 0, "accept")
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 0))
	must(t, setDocument(t.Context(), c, shared.first))
	must(t, s.WaitHops(within(t, time.Minute), stage.Routers(), vips, len(s.Directors())))
	taking(t, s, k)
}

// originalDocument is a document as users of the original have it: what that does not know is not in it.
const originalDocument = `{
  "vipPool":   ["198.51.100.20", "198.51.100.21", "198.51.100.22"],
  "mtuConfig": {"198.51.100.20": "1500", "198.51.100.21": "9000"},
  "mtuConfig6": {"2001:db8:77:1:aaaa:bbbb:cccc:20": "1500"},
  "labels":    {"example.net/lb-backend": "true", "example.net/zone": "blue"},
  "ipv6":      {"198.51.100.20": "2001:db8:77:1:aaaa:bbbb:cccc:20"},
  "config": {
    "198.51.100.20": {
      "443": {"namespace": "shop", "service": "frontend", "portName": "https",
              "ipv4Enabled": true, "ipv6Enabled": true, "tcpEnabled": true, "udpEnabled": true, "proxyProtocolEnabled": false,
              "ipvsOptions": {"scheduler": "mh", "flags": "flag-1,flag-2", "forwardingMethod": "i", "uThreshold": 0, "lThreshold": 0}},
      "9000": {"namespace": "shop", "service": "admin", "portName": "web",
               "tcpEnabled": true, "udpEnabled": false,
               "ipvsOptions": {"scheduler": "wlc", "forwardingMethod": "g", "uThreshold": 30000, "lThreshold": 24000}}
    },
    "198.51.100.21": {
      "53": {"namespace": "infra", "service": "resolver", "portName": "dns", "tcpEnabled": true, "udpEnabled": true, "ipvsOptions": {}}
    }
  },
  "config6": {
    "2001:db8:77:1:aaaa:bbbb:cccc:20": {
      "443": {"namespace": "shop", "service": "frontend", "portName": "https", "tcpEnabled": true, "udpEnabled": false, "ipvsOptions": {"scheduler": "wrr"}}
    }
  }
}`

// The original's document works as it is: every VIP answers by what it enables, and a default service takes the VIP of the
// pool that nothing claims.
func TestTheOriginalsDocumentWorks(t *testing.T) {
	spare := []string{"--auto-configure-service", "shop/web:" + stage.PortName, "--auto-configure-port", "70"}
	s, c, _ := clusterFleetWith(t, spare, spare)
	explain(t, s)
	_, fleetText := shared.first.ConfigMap()
	for _, node := range []string{"r1", "r2", "r3"} {
		patchNode(t, c, node, object{"metadata": object{"labels": object{"example.net/lb-backend": "true", "example.net/zone": "blue"}}})
	}
	err := c.Call(t.Context(), http.MethodPost, "/api/v1/namespaces", object{"metadata": object{"name": "infra"}}, nil)
	var status *cluster.StatusError
	if err != nil && (!errors.As(err, &status) || status.Code != http.StatusConflict) {
		t.Fatal(err)
	}
	for _, v := range []struct {
		namespace, name, port string
		number                int
		proto                 string
	}{
		{stage.Namespace, "frontend", "https", 443, "TCP"}, {stage.Namespace, "admin", "web", 9000, "TCP"}, {"infra", "resolver", "dns", 53, "UDP"},
	} {
		services := "/api/v1/namespaces/" + v.namespace + "/services"
		ports := []any{object{"name": v.port, "port": v.number, "targetPort": kubePodPort, "protocol": v.proto}}
		must(t, c.Call(t.Context(), http.MethodPost, services, object{
			"metadata": object{"name": v.name}, "spec": object{"ipFamilyPolicy": "RequireDualStack", "ports": ports},
		}, nil))
		t.Cleanup(func() { must(t, c.Call(within(t, 20*time.Second), http.MethodDelete, services+"/"+v.name, nil, nil)) })
		// All lab pods that run are behind them: the slices are written by hand, because a selector sees its namespace only.
		for family, addr := range map[string]func(stage.Pod) netip.Addr{
			"IPv4": func(p stage.Pod) netip.Addr { return p.V4 }, "IPv6": func(p stage.Pod) netip.Addr { return p.V6 },
		} {
			var endpoints []any
			for _, p := range s.Pods {
				endpoints = append(endpoints, object{"addresses": []any{addr(p)}, "nodeName": p.Node, "conditions": object{"ready": true}})
			}
			path := "/apis/discovery.k8s.io/v1/namespaces/" + v.namespace + "/endpointslices"
			name := v.name + "-" + strings.ToLower(family)
			must(t, c.Call(t.Context(), http.MethodPost, path, object{
				"metadata":    object{"name": name, "labels": object{"kubernetes.io/service-name": v.name}},
				"addressType": family, "endpoints": endpoints,
				"ports": []any{object{"name": v.port, "port": stage.PodPort, "protocol": v.proto}},
			}, nil))
			t.Cleanup(func() { must(t, c.Call(within(t, 20*time.Second), http.MethodDelete, path+"/"+name, nil, nil)) })
		}
	}
	must(t, setConfigMap(t.Context(), c, object{clusterKey: originalDocument, fleetKey: string(fleetText)}))
	all := []netip.Addr{
		netip.MustParseAddr("198.51.100.20"), netip.MustParseAddr("198.51.100.21"), netip.MustParseAddr("198.51.100.22"),
		netip.MustParseAddr("2001:db8:77:1:aaaa:bbbb:cccc:20"),
	}
	must(t, s.WaitHops(within(t, time.Minute), stage.Routers(), all, len(s.Directors())))
	for _, to := range []string{
		"tcp 198.51.100.20:443", "udp 198.51.100.20:443", "tcp 198.51.100.20:9000", "tcp 198.51.100.21:53", "udp 198.51.100.21:53",
		"tcp 198.51.100.22:70", "tcp 198.51.100.20:70", "tcp [2001:db8:77:1:aaaa:bbbb:cccc:20]:443",
	} {
		network, at, _ := strings.Cut(to, " ")
		for range 10 {
			eventually(t, 30*time.Second, func() error { // a flow of UDP whose first datagram is lost is asked again
				conn, err := dialFrom(s, "c1", 0, network, netip.MustParseAddrPort(at))
				if err != nil {
					return err
				}
				defer func() { _ = conn.Close() }()
				pod, _, err := ask(conn, "hello")
				if err == nil && strings.HasPrefix(pod, "r4") {
					t.Errorf("%s: %s answered, which has not the labels", to, pod)
				}
				return err
			})
		}
	}
	out := ravelSays(t, s, "d1", 0, "services")
	if !strings.Contains(out, "flows: not kept") {
		t.Errorf("ravel services does not say of wlc and wrr that flows are not kept:\n%s", out)
	}
	must(t, setDocument(t.Context(), c, shared.first))
	for _, node := range []string{"r1", "r2", "r3"} {
		patchNode(t, c, node, object{"metadata": object{"labels": object{"example.net/lb-backend": nil, "example.net/zone": nil}}})
	}
}
