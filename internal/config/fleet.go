package config

import (
	"math"
	"net/netip"
	"strconv"
	"strings"

	"github.com/ravel-lb/ravel/internal/config/doc"
	"github.com/ravel-lb/ravel/internal/desired"
)

// fleet reads the fleet document.
func (p *parser) fleet(v doc.Value) {
	o, ok := v.Object("asn", "directors", "directorNodes", "peers", "forwarding", "masquerade", "announce", "communities",
		"largeCommunities", "med", "localPref", "prepend", "pools")
	if !ok {
		return
	}
	f := &p.out.Fleet
	if v, ok := o.Get("asn"); ok {
		f.ASN = asn(v)
	}
	if v, ok := o.Get("directors"); ok {
		p.directors(v)
	}
	if v, ok := o.Get("directorNodes"); ok {
		if f.DirectorNodes, ok = v.TextMap(); ok && len(f.DirectorNodes) == 0 && !v.IsNull() {
			v.Fault("has no label: want one at least, or no directorNodes")
		}
	}
	if v, ok := o.Get("peers"); ok {
		p.peers(v, f)
	}
	if _, set := o.Get("asn"); !set && len(f.Peers) > 0 {
		o.Fault("asn is missing, and there are peers")
	}
	if name, v, ok := text(o, "forwarding", optional); ok {
		if err := f.Forwarding.UnmarshalText([]byte(name)); err != nil {
			v.Fault("%v", err)
		}
	}
	f.Masquerade = boolean(o, "masquerade", false)
	f.Policy = policy(o, desired.Policy{})
	if v, ok := o.Get("pools"); ok {
		f.Pools = pools(v, f.Policy)
	}
}

// asn reads an AS number, as a number or as two with a dot between (asdot, RFC 5396).
func asn(v doc.Value) uint32 {
	s, ok := v.Plain()
	if !ok {
		return 0
	}
	var n uint32
	if high, low, dotted := strings.Cut(s, "."); dotted {
		h, errH := strconv.ParseUint(high, 10, 16)
		l, errL := strconv.ParseUint(low, 10, 16)
		if errH != nil || errL != nil {
			v.Fault("AS number %q: want 1 to 4294967295, or two numbers to 65535 with a dot between", s)
			return 0
		}
		n = uint32(h)<<16 | uint32(l)
	} else {
		number, ok := v.Int(1, math.MaxUint32)
		if !ok {
			return 0
		}
		n = uint32(number)
	}
	switch n {
	case 0:
		v.Fault("AS number 0 is nobody's (RFC 7607): want 1 to 4294967295")
	case 23456, 65535, math.MaxUint32:
		v.Warn("AS number %d is reserved (RFC 6793, RFC 7300): routers may refuse it", n)
	}
	return n
}

// directors reads the members of the fleet.
func (p *parser) directors(v doc.Value) {
	list, _ := v.List()
	names, owners, ids := map[string]doc.Value{}, map[netip.Addr]doc.Value{}, map[netip.Addr]doc.Value{}
	p.hops = map[netip.Addr]hop{}
	for _, v := range list {
		o, ok := v.Object("name", "addresses", "routerID", "labels")
		if !ok {
			continue
		}
		d := desired.FleetDirector{Name: hostName(o, "name")}
		if first, twice := names[d.Name]; twice && d.Name != "" {
			o.Fault("name %q is that of %s too", d.Name, first.Path())
		}
		names[d.Name] = v
		d.Addrs = p.addresses(o, owners)
		families, two := map[bool]bool{}, false
		for _, a := range d.Addrs {
			p.hops[a] = hop{d.Name, owners[a]}
			if families[a.Is4()] {
				two = true
			}
			families[a.Is4()] = true
		}
		if two {
			o.Fault("addresses: want one of a family at most, as next hop")
		}
		if v, ok := o.Get("routerID"); ok {
			d.RouterID = routerID(v)
			if first, twice := ids[d.RouterID]; twice && d.RouterID.IsValid() {
				v.Fault("%s is %s too", d.RouterID, first.Path())
			}
			ids[d.RouterID] = v
		}
		if v, ok := o.Get("labels"); ok {
			d.Labels, _ = v.TextMap()
		}
		p.out.Fleet.Directors = append(p.out.Fleet.Directors, d)
	}
}

// routerID reads a BGP identifier: any IPv4 address but 0.0.0.0 (RFC 6286), which need not be anybody's.
func routerID(v doc.Value) netip.Addr {
	s, ok := v.Text()
	if !ok {
		return netip.Addr{}
	}
	id, err := netip.ParseAddr(s)
	if err != nil || !id.Is4() || id.IsUnspecified() {
		v.Fault("router ID %q: want four numbers such as 192.0.2.1", s)
		return netip.Addr{}
	}
	return id
}
