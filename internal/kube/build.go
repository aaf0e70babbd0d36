package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/setdiff"
)

// builder turns what the caches hold into values. It does over only what changed: a service whose endpoints did not
// change keeps its part, and lists that did not change stay the very same in memory. Its methods are for one goroutine.
type builder struct {
	cluster  document[desired.Cluster]
	fleet    document[desired.Fleet]
	hasFleet bool
	uid      string // of the ConfigMap, also after it went
	also     []desired.Service

	order []ref                 // the services that the cluster document names, or also, sorted
	ports map[ref][]string      // the port names that it names of each, sorted
	where map[ref]string        // the first place of each in the document
	vips  map[netip.Addr]bool   // of the document
	about map[ref]about         // what there is of each service that is named
	parts map[ref]part          // what comes of that
	nodes []desired.Node        // sorted by name
	owner map[netip.Addr]string // the node that has an address; the first by name
	value Value
}

// part is what becomes of one service. It is never changed.
type part struct {
	endpoints []desired.Endpoint // sorted
	problems  []ravel.Problem
	nameless  bool // has endpoints without the name of a node, which the nodes' addresses may tell
}

func newBuilder(o Options) builder {
	of := fmt.Sprintf("configmap %s/%s", o.Namespace, o.Name)
	where := func(key string) string { return of + " key " + key }
	return builder{
		cluster:  document[desired.Cluster]{where: where(o.Key), of: of, parse: o.parseCluster},
		fleet:    document[desired.Fleet]{where: where(o.FleetKey), of: of, parse: config.ParseFleet},
		hasFleet: o.FleetKey != "",
		about:    map[ref]about{}, parts: map[ref]part{}, owner: map[netip.Addr]string{},
	}
}

func (o Options) parseCluster(b []byte) (desired.Cluster, []ravel.Problem, error) {
	return config.ParseCluster(b, o.Default)
}

// remember takes the last good documents of an earlier process, for the case that those of now are bad.
func (b *builder) remember(cluster, fleet string) {
	b.cluster.remember(cluster)
	if b.hasFleet {
		b.fleet.remember(fleet)
	}
}

// known reports whether there is a value.
func (b *builder) known() bool { return b.cluster.known && (!b.hasFleet || b.fleet.known) }

// faults are those of the documents as they now are.
func (b *builder) faults() []ravel.Problem {
	return slices.Compact(slices.Concat(b.cluster.faults, b.fleet.faults)) // both say so of a ConfigMap that is not there
}

// problems are the faults, and what they mean.
func (b *builder) problems() []ravel.Problem {
	return slices.Compact(slices.Concat(b.cluster.problems(), b.fleet.problems()))
}

// build returns the value after the news, and whether it is another one. It has endpoints of the services also, too. lookup
// tells of services.
func (b *builder) build(n news, also []desired.Service, lookup func([]ref) map[ref]about) (Value, bool) {
	var again map[ref]bool // nil: all
	more := !setdiff.Same(b.also, also)
	b.also = also
	switch {
	case n.document != nil && b.lookAt(*n.document), more, b.ports == nil && b.cluster.known:
		b.name()
		b.about = lookup(b.order)
	default:
		again = map[ref]bool{}
		for r, about := range n.services {
			if _, named := b.ports[r]; named {
				b.about[r], again[r] = about, true
			}
		}
	}
	if n.nodes != nil && b.takeNodes(n.nodes) && again != nil {
		for r, p := range b.parts {
			again[r] = again[r] || p.nameless
		}
	}
	if again == nil {
		before := b.parts
		b.parts = make(map[ref]part, len(b.order))
		for _, r := range b.order {
			b.parts[r] = b.part(r, before[r])
		}
		if all := b.endpoints(); !slices.Equal(all, b.value.Cluster.Endpoints) {
			return b.put(all)
		}
		return b.put(b.value.Cluster.Endpoints)
	}
	changed := false
	for r, is := range again {
		if !is {
			continue
		}
		before := b.parts[r]
		b.parts[r] = b.part(r, before)
		changed = changed || !setdiff.Same(before.endpoints, b.parts[r].endpoints)
	}
	if changed {
		return b.put(b.endpoints())
	}
	return b.put(b.value.Cluster.Endpoints)
}

// endpoints are those of all parts.
func (b *builder) endpoints() []desired.Endpoint {
	lists := make([][]desired.Endpoint, 0, len(b.order))
	for _, r := range b.order {
		lists = append(lists, b.parts[r].endpoints)
	}
	return slices.Concat(lists...)
}

// lookAt takes the documents of the ConfigMap, and reports whether the cluster document in force is another one.
func (b *builder) lookAt(c configMap) bool {
	if c.there {
		b.uid = c.uid
	}
	if b.hasFleet {
		b.fleet.look(content{there: c.there, has: c.hasFleet, binary: c.binaryFleet, text: c.fleet})
	}
	return b.cluster.look(content{there: c.there, has: c.has, binary: c.binary, text: c.text})
}

// name finds which services the cluster document names.
func (b *builder) name() {
	b.ports, b.where, b.vips = map[ref][]string{}, map[ref]string{}, map[netip.Addr]bool{}
	for i, s := range slices.Concat(b.cluster.value.Services, b.also) {
		r := ref{s.Namespace, s.Service}
		b.vips[s.Key.VIP] = true
		if at, found := slices.BinarySearch(b.ports[r], s.PortName); !found {
			b.ports[r] = slices.Insert(b.ports[r], at, s.PortName)
		}
		if _, any := b.where[r]; !any && i < len(b.cluster.value.Services) {
			b.where[r] = s.Where
		}
	}
	b.order = slices.SortedFunc(maps.Keys(b.ports), ref.compare)
}

// takeNodes takes all nodes, and reports whether the addresses of any are others.
func (b *builder) takeNodes(all map[string]desired.Node) bool {
	b.nodes = slices.SortedFunc(maps.Values(all), func(x, y desired.Node) int { return cmp.Compare(x.Name, y.Name) })
	before := b.owner
	b.owner = make(map[netip.Addr]string, 2*len(all))
	for _, n := range b.nodes {
		for _, a := range n.Addrs {
			if _, taken := b.owner[a]; !taken {
				b.owner[a] = n.Name
			}
		}
	}
	return !maps.Equal(before, b.owner)
}

// part makes what becomes of a service, in the memory of before where it is equal.
func (b *builder) part(r ref, before part) part {
	about, where := b.about[r], "service "+r.String()
	var p part
	lost := map[string][]string{} // addresses, by what is wrong with them
	var portNames []string
	for _, s := range about.slices {
		for _, port := range s.ports {
			if !slices.Contains(portNames, port.name) {
				portNames = append(portNames, port.name)
			}
			if _, wanted := slices.BinarySearch(b.ports[r], port.name); !wanted {
				continue
			}
			switch {
			case s.names:
				lost["names a host, not an address (addressType FQDN)"] = append(lost["names a host, not an address (addressType FQDN)"], s.name)
				continue
			case port.number == 0:
				const what = "tells no number of a port"
				lost[what] = append(lost[what], s.name)
				continue
			}
			for _, e := range s.endpoints {
				one := desired.Endpoint{
					Namespace: r.namespace, Service: r.name, PortName: port.name, Proto: port.proto, Addr: e.addr, Port: port.number,
					Node: e.node, Ready: e.state == ready, Terminating: e.state == going,
				}
				what := ""
				switch {
				case !e.addr.IsValid():
					what = "has an endpoint that is no address of its type"
					lost[what] = append(lost[what], s.name)
					continue
				case b.vips[e.addr]:
					what = "has an endpoint whose address is a VIP"
				case e.node == "":
					p.nameless = true
					if one.Node = b.owner[e.addr]; one.Node == "" {
						what = "has an endpoint without the name of its node, and no node has its address"
					}
				}
				if what != "" {
					lost[what] = append(lost[what], s.name+" "+e.addr.String())
					continue
				}
				p.endpoints = append(p.endpoints, one)
			}
		}
	}
	p.endpoints = tidy(p.endpoints)
	for what, which := range lost {
		slices.Sort(which)
		which = slices.Compact(which)
		p.problems = append(p.problems, ravel.Problem{Where: where, What: fmt.Sprintf("endpoint slice %s %s: left out", few(which), what)})
	}
	if where, named := b.where[r]; named {
		if hint := b.hint(r, about, portNames); hint != "" {
			p.problems = append(p.problems, ravel.Problem{Where: where, What: hint})
		}
	}
	slices.SortFunc(p.problems, ravel.Problem.Compare)
	if slices.Equal(p.endpoints, before.endpoints) {
		p.endpoints = before.endpoints
	}
	return p
}

// hint says why a service that is named has no endpoints, where that is not just that it has no pods.
func (b *builder) hint(r ref, about about, portNames []string) string {
	switch {
	case about.external:
		return fmt.Sprintf("service %s is of type ExternalName: it has no pods", r)
	case len(about.slices) == 0 && !about.exists:
		return fmt.Sprintf("service %s is not there", r)
	case len(portNames) == 0:
		return ""
	}
	slices.Sort(portNames)
	for _, wanted := range b.ports[r] {
		if _, there := slices.BinarySearch(portNames, wanted); !there {
			return fmt.Sprintf("service %s has no port named %q; it has %q", r, wanted, portNames)
		}
	}
	return ""
}

// few lists the first of many.
func few(list []string) string {
	const most = 3
	if len(list) <= most {
		return strings.Join(list, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), len(list)-most)
}

// tidy sorts endpoints and leaves one of those that are the same pod and port: slices may overlap for a while, and then the
// best that any of them says counts.
func tidy(all []desired.Endpoint) []desired.Endpoint {
	slices.SortFunc(all, func(a, b desired.Endpoint) int {
		return cmp.Or(cmp.Compare(a.PortName, b.PortName), cmp.Compare(a.Proto, b.Proto), a.Addr.Compare(b.Addr), cmp.Compare(a.Port, b.Port),
			-cmp.Compare(rank(a), rank(b)), cmp.Compare(a.Node, b.Node))
	})
	return slices.CompactFunc(all, func(a, b desired.Endpoint) bool {
		return a.PortName == b.PortName && a.Proto == b.Proto && a.Addr == b.Addr && a.Port == b.Port
	})
}

func rank(e desired.Endpoint) int {
	switch {
	case e.Ready:
		return 2
	case e.Terminating:
		return 1
	}
	return 0
}

// put makes the value of the parts and their endpoints, and reports whether it is another one than the last.
func (b *builder) put(endpoints []desired.Endpoint) (Value, bool) {
	v := b.value
	v.Cluster = b.cluster.value
	v.Cluster.Nodes, v.Cluster.Endpoints, v.Also = b.nodes, endpoints, b.also
	v.Document, v.FleetDocument = b.cluster.text, b.fleet.text
	v.Warnings = slices.Concat(b.cluster.warnings, b.fleet.warnings)
	if b.hasFleet && (v.Fleet == nil || b.value.FleetDocument != b.fleet.text) {
		fleet := b.fleet.value
		v.Fleet = &fleet
	}
	var lost []ravel.Problem
	for _, r := range b.order {
		lost = append(lost, b.parts[r].problems...)
	}
	v.Problems = slices.Concat(b.problems(), lost)
	slices.SortStableFunc(v.Problems, ravel.Problem.Compare)
	if slices.Equal(v.Problems, b.value.Problems) {
		v.Problems = b.value.Problems
	}
	was := b.value
	b.value = v
	return v, !setdiff.Same(was.Cluster.Services, v.Cluster.Services) || !setdiff.Same(was.Cluster.Nodes, v.Cluster.Nodes) ||
		!setdiff.Same(was.Cluster.Endpoints, v.Cluster.Endpoints) || !setdiff.Same(was.Also, v.Also) || was.Document != v.Document || was.FleetDocument != v.FleetDocument ||
		!setdiff.Same(was.Problems, v.Problems)
}
