package kube

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
)

// ref names a Service.
type ref struct{ namespace, name string }

func (r ref) String() string { return r.namespace + "/" + r.name }

func (r ref) compare(other ref) int {
	return cmp.Or(cmp.Compare(r.namespace, other.namespace), cmp.Compare(r.name, other.name))
}

// slice is what is kept of an EndpointSlice. It is never changed.
type slice struct {
	ref       // of its Service
	name      string
	ports     []port
	endpoints []endpoint
	// names holds a host name in the place of addresses (addressType FQDN).
	names bool
}

type port struct {
	name   string
	proto  ravel.Proto
	number uint16 // 0 where the slice tells none
}

type endpoint struct {
	addr  netip.Addr // the zero value where what the slice tells is no address of its type
	node  string     // empty where the slice tells none
	state state
}

// state is what the conditions of an endpoint come to.
type state uint8

const (
	idle  state = iota // neither
	going              // terminating, and still serving
	ready
)

// service is what is kept of a Service.
type service struct {
	external bool // of type ExternalName: there are no pods
}

// configMap is what is kept of the ConfigMap.
type configMap struct {
	ref
	there               bool
	uid                 string
	version             string
	text, fleet         string
	has, hasFleet       bool
	binary, binaryFleet bool // the key is there, and holds bytes that are no text
}

// same makes equal strings one in memory: names come again with every object.
func same(s string) string { return unique.Make(s).Value() }

// conditions follow the rules of the EndpointSlice API: ready not told means ready; serving not told means as ready. With
// publishNotReadyAddresses ready is told whatever the pod does, and counts.
func conditions(c discoveryv1.EndpointConditions) state {
	isReady := c.Ready == nil || *c.Ready
	serving := isReady
	if c.Serving != nil {
		serving = *c.Serving
	}
	switch {
	case isReady:
		return ready
	case serving && c.Terminating != nil && *c.Terminating:
		return going
	}
	return idle
}

func keepSlice(s *discoveryv1.EndpointSlice) *slice {
	kept := &slice{
		ref:  ref{same(s.Namespace), same(s.Labels[discoveryv1.LabelServiceName])},
		name: s.Name, names: s.AddressType == discoveryv1.AddressTypeFQDN,
	}
	for _, p := range s.Ports {
		one := port{proto: ravel.TCP}
		if p.Name != nil {
			one.name = same(*p.Name)
		}
		if p.Protocol != nil {
			switch *p.Protocol {
			case corev1.ProtocolTCP:
			case corev1.ProtocolUDP:
				one.proto = ravel.UDP
			default:
				continue
			}
		}
		if p.Port != nil && *p.Port >= 1 && *p.Port <= 65535 {
			one.number = uint16(*p.Port)
		}
		kept.ports = append(kept.ports, one)
	}
	if len(s.Endpoints) > 0 {
		kept.endpoints = make([]endpoint, 0, len(s.Endpoints))
	}
	for _, e := range s.Endpoints {
		one := endpoint{state: conditions(e.Conditions)}
		if e.NodeName != nil {
			one.node = same(*e.NodeName)
		}
		// Addresses beyond the first have no meaning (discovery/v1, Endpoint.Addresses).
		if len(e.Addresses) > 0 && !kept.names {
			one.addr = address(e.Addresses[0], s.AddressType == discoveryv1.AddressTypeIPv4)
		}
		kept.endpoints = append(kept.endpoints, one)
	}
	return kept
}

// address reads an address of a family, and returns the zero value for all else.
func address(s string, is4 bool) netip.Addr {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Is4() != is4 || !usable(a) {
		return netip.Addr{}
	}
	return a
}

// usable reports whether a node or a pod may have an address.
func usable(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast()
}

func (s *slice) equal(other *slice) bool {
	return s.ref == other.ref && s.name == other.name && s.names == other.names && slices.Equal(s.ports, other.ports) &&
		slices.Equal(s.endpoints, other.endpoints)
}

// keepNode keeps what the cluster document and Compute ask of a node. Of its addresses only those of type InternalIP count.
func keepNode(n *corev1.Node, ignoreCordon bool) desired.Node {
	kept := desired.Node{Name: same(n.Name), Labels: make(map[string]string, len(n.Labels)), Draining: n.Spec.Unschedulable && !ignoreCordon}
	for k, v := range n.Labels {
		kept.Labels[same(k)] = same(v)
	}
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			kept.Ready = c.Status == corev1.ConditionTrue
		}
	}
	_, kept.Excluded = n.Labels[corev1.LabelNodeExcludeBalancers]
	for _, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		addr, err := netip.ParseAddr(a.Address)
		if err != nil || !usable(addr) || slices.Contains(kept.Addrs, addr) {
			continue
		}
		kept.Addrs = append(kept.Addrs, addr)
	}
	return kept
}

func keepService(s *corev1.Service) service {
	return service{external: s.Spec.Type == corev1.ServiceTypeExternalName}
}

func keepConfigMap(c *corev1.ConfigMap, key, fleetKey string) configMap {
	kept := configMap{ref: ref{c.Namespace, c.Name}, there: true, uid: string(c.UID), version: c.ResourceVersion}
	kept.text, kept.has = c.Data[key]
	_, kept.binary = c.BinaryData[key]
	if fleetKey != "" {
		kept.fleet, kept.hasFleet = c.Data[fleetKey]
		_, kept.binaryFleet = c.BinaryData[fleetKey]
	}
	return kept
}

// trim takes out of an object, in place, what is not kept anyhow, before the reflector gathers the objects of a first list.
func trim(object any) (any, error) {
	if m, ok := object.(metav1.Object); ok {
		m.SetManagedFields(nil)
		m.SetAnnotations(annotations(m))
	}
	switch o := object.(type) {
	case *corev1.Node:
		o.Status = corev1.NodeStatus{Addresses: o.Status.Addresses, Conditions: slices.DeleteFunc(o.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type != corev1.NodeReady
		})}
		o.Spec = corev1.NodeSpec{Unschedulable: o.Spec.Unschedulable}
	case *corev1.Service:
		o.Labels, o.Status = nil, corev1.ServiceStatus{}
		o.Spec = corev1.ServiceSpec{Type: o.Spec.Type}
	case *discoveryv1.EndpointSlice:
		o.Labels = map[string]string{discoveryv1.LabelServiceName: o.Labels[discoveryv1.LabelServiceName]}
		o.OwnerReferences = nil
		for i := range o.Endpoints {
			e := &o.Endpoints[i]
			e.TargetRef, e.Hints, e.Zone, e.Hostname, e.DeprecatedTopology = nil, nil, nil, nil, nil
		}
	}
	return object, nil
}

// annotations are those that the reflector itself reads.
func annotations(m metav1.Object) map[string]string {
	if end, is := m.GetAnnotations()[metav1.InitialEventsAnnotationKey]; is {
		return map[string]string{metav1.InitialEventsAnnotationKey: end}
	}
	return nil
}

// revision reads a resourceVersion as the number that it is in practice; 0 where it is none.
func revision(version string) uint64 {
	n, err := strconv.ParseUint(version, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func unexpected(object any) error { return fmt.Errorf("an object of type %T", object) }
