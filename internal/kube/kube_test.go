package kube

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const doc1 = `{"config": {"192.0.2.20": {"80": {"namespace": "shop", "service": "web", "portName": "http", "tcpEnabled": true}}}, "config6": {}}`

func configMapOf(data map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "lb", Name: "ravel", UID: "u1"}, Data: data}
}

func nodeOf(name string, addrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	for _, a := range addrs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

func serviceOf(namespace, name string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP}}
}

func to[T any](v T) *T { return &v }

// sliceOf makes a slice of one port named http; endpoints are written "10.1.0.1@node ready".
func sliceOf(namespace, service, name string, endpoints ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: to("http"), Port: to[int32](8080), Protocol: to(corev1.ProtocolTCP)}},
	}
	for _, text := range endpoints {
		where, what, _ := strings.Cut(text, " ")
		addr, node, _ := strings.Cut(where, "@")
		if strings.Contains(addr, ":") {
			s.AddressType = discoveryv1.AddressTypeIPv6
		}
		e := discoveryv1.Endpoint{Addresses: []string{addr}}
		if node != "" {
			e.NodeName = to(node)
		}
		switch what {
		case "ready", "":
			e.Conditions = discoveryv1.EndpointConditions{Ready: to(true), Serving: to(true), Terminating: to(false)}
		case "going":
			e.Conditions = discoveryv1.EndpointConditions{Ready: to(false), Serving: to(true), Terminating: to(true)}
		case "gone":
			e.Conditions = discoveryv1.EndpointConditions{Ready: to(false), Serving: to(false), Terminating: to(true)}
		case "unready":
			e.Conditions = discoveryv1.EndpointConditions{Ready: to(false), Serving: to(false)}
		case "unpublished": // publishNotReadyAddresses
			e.Conditions = discoveryv1.EndpointConditions{Ready: to(true), Serving: to(false), Terminating: to(true)}
		case "untold":
		default:
			panic(what)
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

// source makes a Source that runs until the test ends, and is waited for.
func source(t *testing.T, o Options, change ...func(*Source)) *Source {
	t.Helper()
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	o.Namespace, o.Name, o.Key = "lb", "ravel", "cluster.json"
	s := New(o)
	for _, w := range s.watches {
		w.settle = 10 * time.Millisecond
	}
	for _, c := range change {
		c(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("Run did not end within 5 s")
		}
	})
	return s
}

// waitFor waits until the value is as it should.
func waitFor(t *testing.T, s *Source, what string, is func(Value) bool) Value {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		changed := s.Changed()
		v, known := s.Latest()
		if known && is(v) {
			return v
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("no value: %s; the last is (known %v)\n%s", what, known, text(v))
		}
	}
}

// opened waits until every watch is open: the fake API server tells nothing that came before.
func opened(t *testing.T, s *Source) {
	t.Helper()
	until(t, "all watches are open", func() bool {
		for _, r := range s.Status().Resources {
			if !r.Open {
				return false
			}
		}
		return true
	})
}

func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in 10 s: %s", what)
		}
	}
}

// text is a value, for people.
func text(v Value) string {
	var b strings.Builder
	for _, s := range v.Cluster.Services {
		fmt.Fprintf(&b, "service %s %s\n", s.Key, s.Name())
	}
	for _, n := range v.Cluster.Nodes {
		fmt.Fprintf(&b, "node %s %v", n.Name, n.Addrs)
		for flag, is := range map[string]bool{" not ready": !n.Ready, " draining": n.Draining, " excluded": n.Excluded} {
			if is {
				b.WriteString(flag)
			}
		}
		b.WriteString("\n")
	}
	for _, e := range v.Cluster.Endpoints {
		state := "idle"
		switch {
		case e.Ready:
			state = "ready"
		case e.Terminating:
			state = "going"
		}
		fmt.Fprintf(&b, "endpoint %s/%s:%s %s %s@%s %s\n", e.Namespace, e.Service, e.PortName, e.Proto, netip.AddrPortFrom(e.Addr, e.Port), e.Node, state)
	}
	for _, p := range v.Problems {
		fmt.Fprintf(&b, "problem %s\n", p)
	}
	return b.String()
}

func TestFollows(t *testing.T) {
	api := newAPIServer(t,
		configMapOf(map[string]string{"cluster.json": doc1}), nodeOf("n1", "10.0.0.1", "fd00::1"), nodeOf("n2", "10.0.0.2"),
		serviceOf("shop", "web"), serviceOf("shop", "other"),
		sliceOf("shop", "web", "web-1", "10.1.0.1@n1", "10.1.0.2@n2 unready"), sliceOf("shop", "other", "other-1", "10.1.0.9@n1"),
	)
	s := source(t, Options{Client: api.client(t)})
	v := waitFor(t, s, "the first", func(Value) bool { return true })
	want := `service tcp 192.0.2.20:80 shop/web:http
node n1 [10.0.0.1 fd00::1]
node n2 [10.0.0.2]
endpoint shop/web:http tcp 10.1.0.1:8080@n1 ready
endpoint shop/web:http tcp 10.1.0.2:8080@n2 idle
`
	if diff := cmp.Diff(want, text(v)); diff != "" {
		t.Fatalf("the first value (-want +got):\n%s", diff)
	}
	opened(t, s)

	// A change of a service that nobody names is no value; one of ours changes the endpoints and nothing else.
	api.set(sliceOf("shop", "other", "other-1", "10.1.0.8@n1"))
	api.set(sliceOf("shop", "web", "web-1", "10.1.0.1@n1", "10.1.0.2@n2"))
	next := waitFor(t, s, "the pod is ready", func(v Value) bool { return strings.Contains(text(v), "10.1.0.2:8080@n2 ready") })
	if &v.Cluster.Nodes[0] != &next.Cluster.Nodes[0] || &v.Cluster.Services[0] != &next.Cluster.Services[0] {
		t.Error("nodes or services have moved in memory")
	}

	// A document that names another service finds its endpoints at once.
	doc2 := strings.Replace(doc1, `"service": "web"`, `"service": "other"`, 1)
	api.set(configMapOf(map[string]string{"cluster.json": doc2}))
	next = waitFor(t, s, "the other service", func(v Value) bool { return v.Document == doc2 })
	if !strings.Contains(text(next), "endpoint shop/other:http tcp 10.1.0.8:8080@n1 ready\n") || len(next.Cluster.Endpoints) != 1 {
		t.Errorf("after the document named another service:\n%s", text(next))
	}

	api.remove(nodeOf("n2"))
	waitFor(t, s, "a node went", func(v Value) bool { return len(v.Cluster.Nodes) == 1 })
	api.remove(sliceOf("shop", "other", "other-1"))
	waitFor(t, s, "the slice went", func(v Value) bool { return len(v.Cluster.Endpoints) == 0 })

	// That was one streamed list and watch of each kind, and nothing else was asked for.
	api.mu.Lock()
	defer api.mu.Unlock()
	requests := map[string]int{"watch nodes": 1, "watch services": 1, "watch endpointslices": 1, "watch configmaps": 1}
	if diff := cmp.Diff(requests, api.requests); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// contextOf is a context that its user ends.
func contextOf(testing.TB) (context.Context, context.CancelFunc) {
	return context.WithCancel(context.Background())
}
