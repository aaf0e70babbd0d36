package stage

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/ravel-lb/ravel/lab/topology"
)

// The lab's addresses, as lab/ravel.clab.yml has them.
var (
	VIP4 = netip.MustParseAddr("198.51.100.20")
	VIP6 = netip.MustParseAddr("2001:db8:77::20")
)

// PodPort is where the pods of the lab answer, by TCP and UDP.
const PodPort = 8080

// Pod is a network namespace on a real server.
type Pod struct {
	Node string // r1
	Name string // p1: what the node's `ip netns` calls it
	V4   netip.Addr
	V6   netip.Addr
}

// String returns the pod's name in the whole lab: r1-p1.
func (p Pod) String() string { return p.Node + "-" + p.Name }

// PodsOf lists the pods of a topology, by node and name. Their addresses follow the rule in the topology's head.
func PodsOf(t *topology.Topology) []Pod {
	var pods []Pod
	for _, n := range t.Nodes {
		number, isReal := strings.CutPrefix(n.Name, "r")
		if !isReal {
			continue
		}
		for _, words := range n.Exec {
			if len(words) != 4 || strings.Join(words[:3], " ") != "ip netns add" {
				continue
			}
			index := strings.TrimPrefix(words[3], "p")
			pods = append(pods, Pod{
				Node: n.Name, Name: words[3],
				V4: netip.MustParseAddr(fmt.Sprintf("10.4.%s.1%s", number, index)),
				V6: netip.MustParseAddr(fmt.Sprintf("fd00:4:%s::1%s", number, index)),
			})
		}
	}
	slices.SortFunc(pods, func(a, b Pod) int { return cmp.Compare(a.String(), b.String()) })
	return pods
}

// Service is one VIP:port of the document; it leads to the endpoints that carry its name.
type Service struct {
	VIP        netip.Addr
	Port       int
	Name       string
	TCP, UDP   bool
	Scheduler  string // mh unless set
	Forwarding string // the fleet's unless set
}

// Endpoint is a pod behind a service.
type Endpoint struct {
	Service     string
	Addr        netip.Addr
	Port        int
	Node        string
	Terminating bool
}

// Document is a static file in the making.
type Document struct {
	Services   []Service
	Endpoints  []Endpoint
	Directors  []string // d1, d2, d3
	Nodes      []string // r1, r2, …
	Forwarding string
	Masquerade bool
	HoldTime   string // of the BGP sessions, which agree on the lower one of the two ends: 3s unless set
}

// Clone returns a copy that shares nothing with d.
func (d Document) Clone() Document {
	d.Services, d.Endpoints = slices.Clone(d.Services), slices.Clone(d.Endpoints)
	d.Directors, d.Nodes = slices.Clone(d.Directors), slices.Clone(d.Nodes)
	return d
}

// Back adds pods to the endpoints of a service, in both families.
func (d *Document) Back(service string, pods ...Pod) {
	for _, p := range pods {
		for _, addr := range []netip.Addr{p.V4, p.V6} {
			d.Endpoints = append(d.Endpoints, Endpoint{Service: service, Addr: addr, Port: PodPort, Node: p.Node})
		}
	}
}

// YAML writes the document as ravel reads it from a static file.
func (d Document) YAML() []byte {
	nodes := []object{}
	for _, name := range d.Nodes {
		v4, v6 := NodeAddrs(name)
		nodes = append(nodes, object{"name": name, "addresses": []netip.Addr{v4, v6}})
	}
	endpoints := []object{}
	for _, e := range d.Endpoints {
		for _, proto := range []string{"tcp", "udp"} {
			endpoints = append(endpoints, object{
				"namespace": Namespace, "service": e.Service, "portName": PortName, "protocol": proto,
				"address": e.Addr.String(), "port": e.Port, "node": e.Node, "terminating": e.Terminating,
			})
		}
	}
	return marshal(object{"cluster": d.cluster(), "fleet": d.fleet(), "nodes": nodes, "endpoints": endpoints})
}

// ConfigMap writes the document's two parts that a ConfigMap has, the cluster document in JSON.
func (d Document) ConfigMap() (cluster, fleet []byte) {
	cluster, err := json.Marshal(d.cluster())
	if err != nil {
		panic("stage: " + err.Error()) // maps, strings and numbers always marshal
	}
	return cluster, marshal(d.fleet())
}

// Namespace and PortName are those of every service of the document.
const (
	Namespace = "shop"
	PortName  = "http"
)

// NodeAddrs are the addresses of a real server.
func NodeAddrs(name string) (v4, v6 netip.Addr) {
	number, rack := strings.TrimPrefix(name, "r"), "1"
	if name == "r4" {
		rack = "2"
	}
	return netip.MustParseAddr("10." + rack + ".0.2" + number), netip.MustParseAddr("fd00:" + rack + "::2" + number)
}

type object = map[string]any

func (d Document) cluster() object {
	config := map[bool]object{true: {}, false: {}}
	for _, s := range d.Services {
		vips := config[s.VIP.Is4()]
		ports, ok := vips[s.VIP.String()].(object)
		if !ok {
			ports = object{}
			vips[s.VIP.String()] = ports
		}
		options := object{}
		if s.Scheduler != "" {
			options["scheduler"] = s.Scheduler
		}
		if s.Forwarding != "" {
			options["forwardingMethod"] = s.Forwarding
		}
		ports[strconv.Itoa(s.Port)] = object{
			"namespace": Namespace, "service": s.Name, "portName": PortName,
			"tcpEnabled": s.TCP, "udpEnabled": s.UDP, "ipvsOptions": options,
		}
	}
	return object{"config": config[true], "config6": config[false]}
}

func (d Document) fleet() object {
	var directors []object
	for _, name := range d.Directors {
		n := strings.TrimPrefix(name, "d")
		directors = append(directors, object{"name": name, "addresses": []string{"10.1.0.1" + n, "fd00:1::1" + n}, "routerID": "10.1.0.1" + n})
	}
	return object{
		"asn": 65100, "directors": directors, "forwarding": cmp.Or(d.Forwarding, "auto"), "masquerade": d.Masquerade,
		"communities": []string{"65100:120"},
		"peers": []object{
			{"address": "10.1.0.2", "asn": 65001, "holdTime": cmp.Or(d.HoldTime, "3s"), "keepalive": "1s"},
			{"address": "10.1.0.3", "asn": 65002, "holdTime": cmp.Or(d.HoldTime, "3s"), "keepalive": "1s"},
		},
	}
}

func marshal(v object) []byte {
	out, err := yaml.Marshal(v)
	if err != nil {
		panic("stage: " + err.Error()) // maps, strings and numbers always marshal
	}
	return out
}

// write replaces a file in one step.
func write(path string, content []byte) error {
	temporary := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	if err := os.WriteFile(temporary, content, 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}
