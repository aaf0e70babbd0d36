package config

import (
	"net/netip"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config/doc"
	"github.com/ravel-lb/ravel/internal/desired"
)

// nodes reads the machines that may be real servers.
func (p *parser) nodes(v doc.Value) {
	list, _ := v.List()
	names, owners := map[string]doc.Value{}, map[netip.Addr]doc.Value{}
	for _, v := range list {
		o, ok := v.Object("name", "addresses", "labels", "ready")
		if !ok {
			continue
		}
		n := desired.Node{Name: hostName(o, "name"), Ready: boolean(o, "ready", true)}
		if first, twice := names[n.Name]; twice && n.Name != "" {
			o.Fault("name %q is that of %s too", n.Name, first.Path())
		}
		names[n.Name] = v
		n.Addrs = p.addresses(o, owners)
		for _, a := range n.Addrs {
			if hop, taken := p.hops[a]; taken && hop.director != n.Name {
				owners[a].Fault("%s is %s too, of director %q: a director can be no real server of its own",
					a, hop.place.Path(), hop.director)
			}
		}
		if v, ok := o.Get("labels"); ok {
			n.Labels, _ = v.TextMap()
		}
		p.out.Cluster.Nodes = append(p.out.Cluster.Nodes, n)
	}
}

// addresses reads the addresses of a machine: one at least, nobody else's, and no VIP.
func (p *parser) addresses(o *doc.Object, owners map[netip.Addr]doc.Value) []netip.Addr {
	v, ok := o.Need("addresses")
	if !ok {
		return nil
	}
	list, ok := v.List()
	if ok && len(list) == 0 {
		v.Fault("is empty: want one address at least")
	}
	var addrs []netip.Addr
	for _, v := range list {
		addr, ok := v.Addr()
		if !ok {
			continue
		}
		if first, twice := owners[addr]; twice {
			v.Fault("%s is %s too", addr, first.Path())
		} else {
			owners[addr] = v
		}
		p.notVIP(v, addr)
		addrs = append(addrs, addr)
	}
	return addrs
}

// notVIP refuses the address of a machine or a pod that is also a VIP: whoever holds the VIP would cut it off.
func (p *parser) notVIP(v doc.Value, addr netip.Addr) {
	if vip, taken := p.vips[addr.String()]; taken {
		v.Fault("%s is the VIP of %s", addr, vip.Path())
	}
}

// endpoints reads the pods behind the services.
func (p *parser) endpoints(v doc.Value) {
	list, _ := v.List()
	nodes := make(map[string]bool, len(p.out.Cluster.Nodes))
	for _, n := range p.out.Cluster.Nodes {
		nodes[n.Name] = true
	}
	type pod struct {
		namespace, service, port string
		proto                    ravel.Proto
		at                       netip.AddrPort
	}
	seen := make(map[pod]int, len(list))
	p.out.Cluster.Endpoints = make([]desired.Endpoint, 0, len(list))
	for i, v := range list {
		o, ok := v.Object("namespace", "service", "portName", "protocol", "address", "port", "node", "ready",
			"terminating")
		if !ok {
			continue
		}
		e := desired.Endpoint{
			Namespace:   kubeName(o, "namespace", needed, strict),
			Service:     kubeName(o, "service", needed, strict),
			PortName:    kubeName(o, "portName", optional, strict),
			Proto:       protocol(o),
			Node:        hostName(o, "node"),
			Terminating: boolean(o, "terminating", false),
		}
		e.Ready = boolean(o, "ready", !e.Terminating)
		if e.Ready && e.Terminating {
			o.Fault("is both ready and terminating: want one of them")
		}
		address, hasAddress := o.Need("address")
		if hasAddress {
			if e.Addr, hasAddress = address.Addr(); hasAddress {
				p.notVIP(address, e.Addr)
			}
		}
		port, hasPort := o.Need("port")
		if hasPort {
			var number int64
			number, hasPort = port.Int(1, 65535)
			e.Port = uint16(number)
		}
		if hasAddress && hasPort {
			key := pod{e.Namespace, e.Service, e.PortName, e.Proto, netip.AddrPortFrom(e.Addr, e.Port)}
			if first, twice := seen[key]; twice {
				o.Fault("is the same as %s", list[first].Path())
			}
			seen[key] = i
		}
		if e.Node != "" && !nodes[e.Node] {
			o.Warn("node %q is not in the list of nodes, so this pod gets no traffic", e.Node)
		}
		p.out.Cluster.Endpoints = append(p.out.Cluster.Endpoints, e)
	}
}

func protocol(o *doc.Object) ravel.Proto {
	proto := ravel.TCP
	name, v, ok := text(o, "protocol", optional)
	if ok {
		if err := proto.UnmarshalText([]byte(name)); err != nil {
			v.Fault("%v", err)
		}
	}
	return proto
}
