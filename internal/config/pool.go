package config

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config/doc"
	"github.com/ravel-lb/ravel/internal/desired"
)

// DefaultService reads what the original's --auto-configure-service and --auto-configure-port say: "namespace/service:port
// name" and the VIPs' port. Where no service is named there is none, whatever the port.
func DefaultService(service string, port int) (*desired.DefaultService, error) {
	if service == "" {
		return nil, nil
	}
	namespace, rest, found := strings.Cut(strings.ToLower(service), "/")
	name, portName, _ := strings.Cut(rest, ":")
	switch {
	case !found || !kubeLabel(namespace) || !kubeLabel(name) || portName != "" && !kubeLabel(portName):
		return nil, fmt.Errorf("default service %q: want namespace/service:portName", service)
	case port == 0:
		return nil, errors.New("a default service and no port: want one from 1 to 65535")
	case port < 1 || port > 65535:
		return nil, fmt.Errorf("port %d of the default service: want 1 to 65535", port)
	}
	return &desired.DefaultService{Namespace: namespace, Service: name, PortName: portName, Port: uint16(port)}, nil
}

// pool reads the VIPs of the cluster, and the service that those get which have nothing on its port. The original never
// read its addresses before it made services of them, so what cannot be one is left out.
func (p *parser) pool(o *doc.Object) {
	places := map[netip.Addr]doc.Value{}
	if v, ok := o.Get("vipPool"); ok {
		list, _ := v.List()
		for _, e := range list {
			text, ok := e.Text()
			if !ok {
				continue
			}
			switch vip, why := doc.HostAddr(text); {
			case why != "":
				e.Warn("%s; it is left out", why)
			case places[vip] != doc.Value{}:
				e.Warn("%s is in the list twice", vip)
			default:
				places[vip] = e
				p.out.Cluster.Pool = append(p.out.Cluster.Pool, desired.PoolVIP{VIP: vip, Where: e.Path()})
			}
		}
	}
	standard := p.standard
	if v, ok := o.Get("defaultService"); ok {
		d, ok := defaultService(v)
		if !ok {
			return
		}
		if len(p.out.Cluster.Pool) == 0 {
			v.Warn("has no effect: vipPool has no VIP")
		}
		standard = &d
	}
	if standard == nil {
		return
	}
	p.out.Cluster = p.out.Cluster.WithDefault(standard)
	for vip, place := range places {
		if _, known := p.vips[vip.String()]; !known {
			p.vips[vip.String()] = place
		}
	}
}

func defaultService(v doc.Value) (desired.DefaultService, bool) {
	o, ok := v.LenientObject("namespace", "service", "portName", "port")
	if !ok {
		return desired.DefaultService{}, false
	}
	d := desired.DefaultService{
		Namespace: kubeName(o, "namespace", needed, folded),
		Service:   kubeName(o, "service", needed, folded),
		PortName:  kubeName(o, "portName", optional, folded),
	}
	port, ok := o.Need("port")
	if !ok {
		return d, false
	}
	n, ok := port.Int(1, 65535)
	d.Port = uint16(n)
	return d, ok
}

// The MTUs that a VIP may have: IPv6 wants the least (RFC 8200 section 5), and jumbo frames end there.
const (
	minMTU = 1280
	maxMTU = 9216
)

// mtus reads the MTUs of VIPs of one family, in texts. What the original skipped is skipped.
func (p *parser) mtus(o *doc.Object, key string, v6 bool) {
	v, ok := o.Get(key)
	if !ok {
		return
	}
	entries, _ := v.Entries()
	clamped := p.clamped()
	for _, e := range entries {
		if e.IsWrittenNull() {
			continue
		}
		text, ok := e.Plain()
		if !ok {
			continue
		}
		mtu, err := strconv.Atoi(text)
		vip, why := doc.HostAddr(e.Key())
		switch {
		case err != nil:
			e.Warn("MTU %q is no number; it is left out", text)
		case mtu < minMTU || mtu > maxMTU:
			e.Fault("MTU %d: want %d to %d", mtu, minMTU, maxMTU)
		case why != "":
			e.Warn("%s; it is left out", why)
		case vip.Is6() != v6:
			e.Warn("is not of the family of cluster.%s; it is left out", key)
		case !clamped[vip]:
			e.Warn("has no effect: no service has this VIP by TCP")
		case p.out.Cluster.MTU[vip] != 0 && p.out.Cluster.MTU[vip] != mtu:
			e.Fault("%s has another MTU already, %d", vip, p.out.Cluster.MTU[vip])
		default:
			if p.out.Cluster.MTU == nil {
				p.out.Cluster.MTU = map[netip.Addr]int{}
			}
			p.out.Cluster.MTU[vip] = mtu
		}
	}
}

// clamped are the VIPs that have TCP, or may get it as those of the pool.
func (p *parser) clamped() map[netip.Addr]bool {
	vips := make(map[netip.Addr]bool, len(p.out.Cluster.Services))
	for _, v := range p.out.Cluster.Pool {
		vips[v.VIP] = true
	}
	for _, s := range p.out.Cluster.Services {
		if s.Key.Proto == ravel.TCP {
			vips[s.Key.VIP] = true
		}
	}
	return vips
}
