package kube

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/ravel-lb/ravel/internal/desired"
)

// bare is what turns objects into values, without an API server.
type bare struct {
	caches  *caches
	builder builder
	stores  map[string]store
	also    []desired.Service
}

func newBare(o Options) *bare {
	o.Namespace, o.Name, o.Key = "lb", "ravel", "cluster.json"
	b := &bare{caches: newCaches(o.Key, o.FleetKey), builder: newBuilder(o), stores: map[string]store{}}
	for _, kind := range []string{kindConfigMaps, kindNodes, kindServices, kindSlices} {
		b.stores[kind] = store{caches: b.caches, kind: kind, ignoreCordon: o.IgnoreCordon, heard: func() {}, filled: func() {}}
	}
	return b
}

func kindOf(object runtime.Object) string {
	switch object.(type) {
	case *corev1.Node:
		return kindNodes
	case *corev1.Service:
		return kindServices
	case *discoveryv1.EndpointSlice:
		return kindSlices
	}
	return kindConfigMaps
}

// fill gives the caches all objects there are.
func (b *bare) fill(t testing.TB, objects ...runtime.Object) {
	t.Helper()
	byKind := map[string][]any{}
	for _, o := range objects {
		byKind[kindOf(o)] = append(byKind[kindOf(o)], o)
	}
	for kind, s := range b.stores {
		if err := s.Replace(byKind[kind], "1"); err != nil {
			t.Fatal(err)
		}
	}
}

// value is what comes of the caches now.
func (b *bare) value(t testing.TB) (Value, bool) {
	t.Helper()
	n, synced := b.caches.take()
	if !synced {
		t.Fatal("the caches are not filled")
	}
	return b.builder.build(n, b.also, b.caches.about)
}

func valueOf(t testing.TB, o Options, objects ...runtime.Object) Value {
	t.Helper()
	b := newBare(o)
	b.fill(t, objects...)
	v, _ := b.value(t)
	return v
}

var webMap = configMapOf(map[string]string{"cluster.json": doc1})

func change[T any](v T, f func(T)) T {
	f(v)
	return v
}

// What a node or an endpoint must be to count.
func TestEligibility(t *testing.T) {
	n1 := nodeOf("n1", "10.0.0.1")
	web := serviceOf("shop", "web")
	for _, test := range []struct {
		name    string
		options Options
		objects []runtime.Object
		want    string
	}{
		{
			name: "conditions of endpoints",
			objects: []runtime.Object{n1, web, sliceOf("shop", "web", "s", "10.1.0.1@n1 ready", "10.1.0.2@n1 going", "10.1.0.3@n1 gone",
				"10.1.0.4@n1 unready", "10.1.0.5@n1 unpublished", "10.1.0.6@n1 untold")},
			want: `node n1 [10.0.0.1]
endpoint shop/web:http tcp 10.1.0.1:8080@n1 ready
endpoint shop/web:http tcp 10.1.0.2:8080@n1 going
endpoint shop/web:http tcp 10.1.0.3:8080@n1 idle
endpoint shop/web:http tcp 10.1.0.4:8080@n1 idle
endpoint shop/web:http tcp 10.1.0.5:8080@n1 ready
endpoint shop/web:http tcp 10.1.0.6:8080@n1 ready
`,
		},
		{
			name: "one pod in two slices counts once, with the best that is said of it",
			objects: []runtime.Object{n1, web, sliceOf("shop", "web", "a", "10.1.0.1@n1 going", "10.1.0.2@n1 unready"),
				sliceOf("shop", "web", "b", "10.1.0.1@n1 ready", "10.1.0.2@n1 going")},
			want: `node n1 [10.0.0.1]
endpoint shop/web:http tcp 10.1.0.1:8080@n1 ready
endpoint shop/web:http tcp 10.1.0.2:8080@n1 going
`,
		},
		{
			name:    "no name of a node: the address of a node tells it, any other is left out",
			objects: []runtime.Object{n1, nodeOf("n2", "10.0.0.2"), web, sliceOf("shop", "web", "s", "10.0.0.2", "10.9.0.1", "10.0.0.1@n1")},
			want: `node n1 [10.0.0.1]
node n2 [10.0.0.2]
endpoint shop/web:http tcp 10.0.0.1:8080@n1 ready
endpoint shop/web:http tcp 10.0.0.2:8080@n2 ready
problem service shop/web: endpoint slice s 10.9.0.1 has an endpoint without the name of its node, and no node has its address: left out
`,
		},
		{
			name: "host names, ports without a number, other protocols and VIPs are left out",
			objects: []runtime.Object{
				n1, web, sliceOf("shop", "web", "s", "192.0.2.20@n1", "10.1.0.1@n1"),
				change(sliceOf("shop", "web", "named", "host.example@n1"), func(s *discoveryv1.EndpointSlice) { s.AddressType = discoveryv1.AddressTypeFQDN }),
				change(sliceOf("shop", "web", "portless", "10.1.0.2@n1"), func(s *discoveryv1.EndpointSlice) { s.Ports = nil }),
				change(sliceOf("shop", "web", "numberless", "10.1.0.3@n1"), func(s *discoveryv1.EndpointSlice) { s.Ports[0].Port = nil }),
				change(sliceOf("shop", "web", "sctp", "10.1.0.4@n1"), func(s *discoveryv1.EndpointSlice) { s.Ports[0].Protocol = to(corev1.ProtocolSCTP) }),
				change(sliceOf("shop", "web", "wrong", "fd01::1@n1", "fd01::%eth0@n1"), func(s *discoveryv1.EndpointSlice) { s.AddressType = discoveryv1.AddressTypeIPv4 }),
			},
			want: `node n1 [10.0.0.1]
endpoint shop/web:http tcp 10.1.0.1:8080@n1 ready
problem service shop/web: endpoint slice named names a host, not an address (addressType FQDN): left out
problem service shop/web: endpoint slice numberless tells no number of a port: left out
problem service shop/web: endpoint slice s 192.0.2.20 has an endpoint whose address is a VIP: left out
problem service shop/web: endpoint slice wrong has an endpoint that is no address of its type: left out
`,
		},
		{
			name: "both families",
			objects: []runtime.Object{nodeOf("n1", "10.0.0.1", "fd00::1"), web, sliceOf("shop", "web", "v4", "10.1.0.1@n1"),
				sliceOf("shop", "web", "v6", "fd01::1@n1")},
			want: `node n1 [10.0.0.1 fd00::1]
endpoint shop/web:http tcp 10.1.0.1:8080@n1 ready
endpoint shop/web:http tcp [fd01::1]:8080@n1 ready
`,
		},
		{
			name: "nodes",
			objects: []runtime.Object{
				web, sliceOf("shop", "web", "s", "10.1.0.1@cordoned"),
				change(nodeOf("cordoned", "10.0.0.1"), func(n *corev1.Node) { n.Spec.Unschedulable = true }),
				change(nodeOf("excluded", "10.0.0.2"), func(n *corev1.Node) {
					n.Labels = map[string]string{"node.kubernetes.io/exclude-from-external-load-balancers": ""}
				}),
				change(nodeOf("external", "10.0.0.3", "10.0.0.4"), func(n *corev1.Node) {
					n.Status.Addresses = slices.Insert(n.Status.Addresses, 0, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: "203.0.113.1"},
						corev1.NodeAddress{Type: corev1.NodeHostName, Address: "external"})
				}),
				nodeOf("nowhere"), change(nodeOf("odd", "not an address", "::ffff:10.0.0.9", "10.0.0.5", "10.0.0.5"), func(*corev1.Node) {}),
				change(nodeOf("lost", "10.0.0.6"), func(n *corev1.Node) { n.Status.Conditions[0].Status = corev1.ConditionUnknown }),
				change(nodeOf("new", "10.0.0.7"), func(n *corev1.Node) { n.Status.Conditions = nil }),
			},
			want: `node cordoned [10.0.0.1] draining
node excluded [10.0.0.2] excluded
node external [10.0.0.3 10.0.0.4]
node lost [10.0.0.6] not ready
node new [10.0.0.7] not ready
node nowhere []
node odd [10.0.0.5]
endpoint shop/web:http tcp 10.1.0.1:8080@cordoned ready
`,
		},
		{
			name:    "cordons are ignored by a setting",
			options: Options{IgnoreCordon: true},
			objects: []runtime.Object{web, sliceOf("shop", "web", "s"), change(nodeOf("n1", "10.0.0.1"), func(n *corev1.Node) { n.Spec.Unschedulable = true })},
			want:    "node n1 [10.0.0.1]\n",
		},
		{
			name:    "a service that is not there",
			objects: []runtime.Object{n1},
			want:    "node n1 [10.0.0.1]\nproblem cluster.config[\"192.0.2.20\"][\"80\"]: service shop/web is not there\n",
		},
		{
			name:    "a service without pods yet is none of our problems here",
			objects: []runtime.Object{n1, web},
			want:    "node n1 [10.0.0.1]\n",
		},
		{
			name:    "a service of another kind, and one with other ports",
			objects: []runtime.Object{n1, change(serviceOf("shop", "web"), func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName })},
			want:    "node n1 [10.0.0.1]\nproblem cluster.config[\"192.0.2.20\"][\"80\"]: service shop/web is of type ExternalName: it has no pods\n",
		},
		{
			name:    "other port names",
			objects: []runtime.Object{n1, web, change(sliceOf("shop", "web", "s", "10.1.0.1@n1"), func(s *discoveryv1.EndpointSlice) { s.Ports[0].Name = to("https") })},
			want:    "node n1 [10.0.0.1]\nproblem cluster.config[\"192.0.2.20\"][\"80\"]: service shop/web has no port named \"http\"; it has [\"https\"]\n",
		},
		{
			name: "slices of no service, and of one of that name elsewhere",
			objects: []runtime.Object{n1, web, change(sliceOf("shop", "web", "s", "10.1.0.1@n1"), func(s *discoveryv1.EndpointSlice) { s.Labels = nil }),
				sliceOf("other", "web", "s", "10.1.0.1@n1")},
			want: "node n1 [10.0.0.1]\n",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := text(valueOf(t, test.options, append(test.objects, webMap)...))
			if diff := cmp.Diff("service tcp 192.0.2.20:80 shop/web:http\n"+test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// Whatever way the caches came to hold what they hold, the value is that of caches that were filled with it at once; and a
// part that did not change is the same in memory.
func TestAnyOrderGivesTheSame(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	pick := func(of ...string) string { return of[rng.IntN(len(of))] }
	document := func() string {
		var ports []string
		for i := range rng.IntN(5) {
			ports = append(ports, fmt.Sprintf(`"%d": {"namespace": "ns%d", "service": "s%d", "portName": %q, "tcpEnabled": true}`,
				80+i, rng.IntN(2), rng.IntN(4), pick("http", "other", "")))
		}
		return pick(`{"config": {"192.0.2.1": {`+strings.Join(ports, ", ")+`}}}`, `{"config": {"10.1.0.3": {`+strings.Join(ports, ", ")+`}}}`)
	}
	random := func() runtime.Object {
		switch rng.IntN(8) {
		case 0:
			n := nodeOf(fmt.Sprintf("n%d", rng.IntN(4)), fmt.Sprintf("10.0.0.%d", rng.IntN(6)+1))
			n.Spec.Unschedulable = rng.IntN(3) == 0
			return n
		case 1:
			s := serviceOf(fmt.Sprintf("ns%d", rng.IntN(2)), fmt.Sprintf("s%d", rng.IntN(4)))
			if rng.IntN(4) == 0 {
				s.Spec.Type = corev1.ServiceTypeExternalName
			}
			return s
		case 2:
			switch rng.IntN(8) {
			case 0:
				return configMapOf(map[string]string{"another": "x"})
			case 1:
				return configMapOf(map[string]string{"cluster.json": "{"})
			}
			return configMapOf(map[string]string{"cluster.json": document()})
		}
		var endpoints []string
		for range rng.IntN(4) {
			at := pick(fmt.Sprintf("10.1.0.%d", rng.IntN(6)), fmt.Sprintf("10.0.0.%d", rng.IntN(6)+1), fmt.Sprintf("10.1.0.%d@n%d", rng.IntN(6), rng.IntN(4)))
			endpoints = append(endpoints, at+" "+pick("ready", "going", "unready", "gone"))
		}
		s := sliceOf(fmt.Sprintf("ns%d", rng.IntN(2)), fmt.Sprintf("s%d", rng.IntN(4)), fmt.Sprintf("slice%d", rng.IntN(8)), endpoints...)
		s.Ports[0].Name = to(pick("http", "http", "other", ""))
		return s
	}
	nameOf := func(o runtime.Object) string {
		m := o.(metav1.Object)
		return kindOf(o) + " " + m.GetNamespace() + "/" + m.GetName()
	}
	for range 20 {
		b := newBare(Options{})
		objects := map[string]runtime.Object{}
		var lastGood string
		b.fill(t)
		var before Value
		for range 150 {
			switch o := random(); rng.IntN(6) {
			case 0: // deleted
				delete(objects, nameOf(o))
				must(t, b.stores[kindOf(o)].Delete(o))
			case 1: // listed again, one more and one less than was known
				kind, all := kindOf(o), []any{o}
				objects[nameOf(o)] = o
				for name, other := range maps.Clone(objects) {
					switch {
					case kindOf(other) != kind || name == nameOf(o):
					case rng.IntN(3) == 0:
						delete(objects, name)
					default:
						all = append(all, other)
					}
				}
				must(t, b.stores[kind].Replace(all, "7"))
			default:
				objects[nameOf(o)] = o
				must(t, b.stores[kindOf(o)].Update(o))
			}
			if rng.IntN(3) == 0 {
				continue // several changes make one value
			}
			if c, there := objects["configmaps lb/ravel"]; there && strings.HasPrefix(c.(*corev1.ConfigMap).Data["cluster.json"], `{"config"`) {
				lastGood = c.(*corev1.ConfigMap).Data["cluster.json"]
			}
			v, changed := b.value(t)
			scratch := newBare(Options{})
			scratch.builder.remember(lastGood, "")
			scratch.fill(t, slices.Collect(maps.Values(objects))...)
			want, _ := scratch.value(t)
			if diff := cmp.Diff(want, v, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Fatalf("(-all at once +one after the other):\n%s", diff)
			}
			if !changed && text(v) != text(before) {
				t.Fatalf("not said to have changed:\n%s\nwas\n%s", text(v), text(before))
			}
			if slices.Equal(before.Cluster.Endpoints, v.Cluster.Endpoints) && len(v.Cluster.Endpoints) > 0 && &before.Cluster.Endpoints[0] != &v.Cluster.Endpoints[0] {
				t.Fatal("equal endpoints have moved in memory")
			}
			before = v
		}
	}
}

// A change of one service leaves what was made of the others where it is.
func TestPartsStay(t *testing.T) {
	b := newBare(Options{})
	objects := large(20, 10, 200)
	b.fill(t, objects...)
	b.value(t)
	before := maps.Clone(b.builder.parts)
	must(t, b.stores[kindSlices].Update(sliceOf("ns", "svc-3", "svc-3-0", "10.9.9.9@node-1")))
	if _, changed := b.value(t); !changed {
		t.Fatal("nothing changed")
	}
	for r, p := range b.builder.parts {
		if same := len(p.endpoints) > 0 && &p.endpoints[0] == &before[r].endpoints[0]; same == (r.name == "svc-3") {
			t.Errorf("%s: the same in memory: %v", r, same)
		}
	}
	// What says the same again is no change.
	must(t, b.stores[kindSlices].Update(sliceOf("ns", "svc-3", "svc-3-0", "10.9.9.9@node-1")))
	for _, o := range objects {
		if kindOf(o) == kindNodes || kindOf(o) == kindServices {
			must(t, b.stores[kindOf(o)].Update(o))
		}
	}
	if _, changed := b.value(t); changed {
		t.Error("what was said again is a change")
	}
}

// large is a cluster whose document names all services.
func large(services, nodes, endpoints int) []runtime.Object {
	var objects []runtime.Object
	var document strings.Builder
	document.WriteString(`{"config": {`)
	for i := range services {
		if i > 0 {
			document.WriteString(", ")
		}
		fmt.Fprintf(&document, `"192.%d.%d.%d": {"80": {"namespace": "ns", "service": "svc-%d", "portName": "http", "tcpEnabled": true}}`,
			18+i/62500, i/250%250, i%250+1, i)
		objects = append(objects, serviceOf("ns", fmt.Sprintf("svc-%d", i)), largeSlice(i, endpoints/services, nodes))
	}
	document.WriteString("}}")
	for i := range nodes {
		n := nodeOf(fmt.Sprintf("node-%d", i), fmt.Sprintf("10.254.%d.%d", i/250, i%250+1))
		n.Labels = map[string]string{"kubernetes.io/hostname": n.Name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "topology.kubernetes.io/zone": "a"}
		objects = append(objects, n)
	}
	return append(objects, configMapOf(map[string]string{"cluster.json": document.String()}))
}

// largeSlice is the slice of the i-th service of a large cluster, as the controller makes it.
func largeSlice(i, endpoints, nodes int) *discoveryv1.EndpointSlice {
	var list []string
	for j := range endpoints {
		k := i*endpoints + j
		list = append(list, fmt.Sprintf("10.%d.%d.%d@node-%d", k/62500, k/250%250, k%250+1, k%nodes))
	}
	return sliceOf("ns", fmt.Sprintf("svc-%d", i), fmt.Sprintf("svc-%d-0", i), list...)
}

// Of services that the document does not name, endpoints are told on request, and nothing else.
func TestServicesThatAreInForceStill(t *testing.T) {
	b := newBare(Options{})
	old := serviceOf("shop", "old")
	b.fill(t, webMap, nodeOf("n1", "10.0.0.1"), serviceOf("shop", "web"), old,
		sliceOf("shop", "web", "w", "10.1.0.1@n1"), sliceOf("shop", "old", "o", "10.1.0.2@n1"))
	count := func(what string, want int, changes bool) {
		t.Helper()
		v, changed := b.value(t)
		if changed != changes || len(v.Cluster.Endpoints) != want || len(v.Problems) > 0 || len(v.Also) != len(b.also) {
			t.Errorf("%s: changed %t, %d also, %s", what, changed, len(v.Also), text(v))
		}
	}
	count("at first", 1, true)
	b.also = []desired.Service{{Namespace: "shop", Service: "old", PortName: "http"}, {Namespace: "shop", Service: "gone", PortName: "http"}}
	count("one more is asked for, and one that is not there", 2, true)
	count("nothing changed", 2, false)
	if err := b.stores[kindSlices].Update(sliceOf("shop", "old", "o", "10.1.0.2@n1", "10.1.0.3@n1")); err != nil {
		t.Fatal(err)
	}
	count("a pod came", 3, true)
	if err := b.stores[kindSlices].Delete(sliceOf("shop", "old", "o")); err != nil {
		t.Fatal(err)
	}
	count("all went", 1, true)
	b.also = nil
	count("nobody asks any more", 1, true)
}
