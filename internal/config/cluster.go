package config

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config/doc"
	"github.com/ravel-lb/ravel/internal/desired"
)

// cluster reads the cluster document, which is field-compatible with the original Ravel's: as Go's encoding/json
// would read it, except that everything that would not work is named.
func (p *parser) cluster(v doc.Value) {
	o, ok := v.LenientObject("vipPool", "mtuConfig", "mtuConfig6", "labels", "ipv6", "config", "config6")
	if !ok {
		return
	}
	p.vipPool(o)
	for _, key := range []string{"mtuConfig", "mtuConfig6"} {
		if v, ok := o.Get(key); ok {
			if entries, _ := v.Entries(); len(entries) > 0 {
				v.Warn("has no effect: all VIPs share one link")
			}
		}
	}
	if v, ok := o.Get("ipv6"); ok {
		v.Entries() // it served statistics of the original only
	}
	if v, ok := o.Get("labels"); ok {
		p.out.Cluster.Labels, _ = v.TextMap()
	}
	v4, has4 := o.Get("config")
	v6, has6 := o.Get("config6")
	if !has4 && !has6 {
		o.Fault("config and config6 are missing: where no service is meant, write config: {}")
	}
	p.vips = map[string]doc.Value{}
	if has4 {
		p.config(v4, false)
	}
	if has6 {
		p.config(v6, true)
	}
}

// vipPool is checked, and has no effect beyond that: the original gave a default service to each of its addresses.
func (p *parser) vipPool(o *doc.Object) {
	v, ok := o.Get("vipPool")
	if !ok {
		return
	}
	addrs, _ := v.List()
	seen := map[netip.Addr]bool{}
	for _, a := range addrs {
		switch addr, ok := a.Addr(); {
		case ok && seen[addr]:
			a.Warn("%s is in the list twice", addr)
		case ok:
			seen[addr] = true
		}
	}
}

// config reads the VIPs of one family.
func (p *parser) config(v doc.Value, ipv6 bool) {
	vips, _ := v.Entries()
	for _, v := range vips {
		vip, ok := v.KeyAddr()
		switch {
		case !ok:
		case vip.Is6() && !ipv6:
			v.KeyFault("%s is an IPv6 address: it belongs in cluster.config6", vip)
		case vip.Is4() && ipv6:
			v.KeyFault("%s is an IPv4 address: it belongs in cluster.config", vip)
		default:
			if first, twice := p.vips[vip.String()]; twice {
				v.KeyFault("is the same VIP as %s (line %d)", first.Path(), first.Line())
			} else {
				p.vips[vip.String()] = v
			}
		}
		if v.IsNull() {
			v.KeyFault("has no ports: where none is meant, write {}")
			continue
		}
		ports, ok := v.Entries()
		if ok && len(ports) == 0 {
			v.Warn("has no ports, so the VIP is not served")
		}
		for _, v := range ports {
			p.service(v, vip)
		}
	}
}

// service reads what is to be served on one VIP and port.
func (p *parser) service(v doc.Value, vip netip.Addr) {
	port, _ := v.KeyInt("port", 1, 65535)
	if v.IsNull() {
		v.KeyFault("is nothing: want a service")
		return
	}
	o, ok := v.LenientObject("namespace", "service", "portName", "tcpEnabled", "udpEnabled", "udpMode", "ipvsOptions",
		"ipv4Enabled", "ipv6Enabled", "proxyProtocolEnabled")
	if !ok {
		return
	}
	s := desired.Service{
		Namespace: kubeName(o, "namespace", needed, folded),
		Service:   kubeName(o, "service", needed, folded),
		PortName:  kubeName(o, "portName", optional, folded),
		Scheduler: ravel.MH, Flags: ravel.Fallback | ravel.HashPort,
		Where: v.Path(),
	}
	tcp, udp := boolean(o, "tcpEnabled", false), boolean(o, "udpEnabled", false)
	boolean(o, "ipv4Enabled", false)
	boolean(o, "ipv6Enabled", false)
	if v, ok := o.Get("proxyProtocolEnabled"); ok {
		if on, _ := v.Bool(); on {
			v.Warn("has no effect: packets are not rewritten, so there is no place for the PROXY protocol")
		}
	}
	if !tcp && !udp {
		o.Warn("neither tcpEnabled nor udpEnabled: nothing is served here")
	}
	oneShot := udpMode(o, udp, port)
	if v, ok := o.Get("ipvsOptions"); ok {
		ipvsOptions(v, &s)
	}
	if tcp {
		s.Key = ravel.ServiceKey{VIP: vip, Proto: ravel.TCP, Port: uint16(port)}
		p.out.Cluster.Services = append(p.out.Cluster.Services, s)
	}
	if udp {
		s.Key = ravel.ServiceKey{VIP: vip, Proto: ravel.UDP, Port: uint16(port)}
		s.OnePacket = oneShot
		p.out.Cluster.Services = append(p.out.Cluster.Services, s)
	}
}

// udpMode says whether each datagram is scheduled by itself. That is what DNS wants, and nothing else may like.
func udpMode(o *doc.Object, udp bool, port int64) (oneShot bool) {
	const dns = 53
	v, ok := o.Get("udpMode")
	if !ok {
		return port == dns
	}
	mode, ok := v.Text()
	switch {
	case !ok:
	case !strings.EqualFold(mode, "oneshot") && !strings.EqualFold(mode, "sticky"):
		v.Fault("udpMode %q: want oneshot or sticky", mode)
	case !udp:
		v.Warn("has no effect without udpEnabled")
	}
	return strings.EqualFold(mode, "oneshot")
}

// ipvsOptions reads how directors spread and forward a service.
func ipvsOptions(v doc.Value, s *desired.Service) {
	o, ok := v.LenientObject("scheduler", "flags", "forwardingMethod", "uThreshold", "lThreshold",
		"persistence", "persistenceTimeout")
	if !ok {
		return
	}
	if v, ok := o.Get("scheduler"); ok {
		name, ok := v.Text()
		name = strings.ToLower(strings.TrimSpace(name))
		switch {
		case !ok || name == "":
		case !slices.Contains(ravel.Schedulers(), ravel.Scheduler(name)):
			v.Fault("scheduler %q: want one of %s", name, join(ravel.Schedulers()))
		default:
			s.Scheduler = ravel.Scheduler(name)
		}
	}
	if s.Scheduler != ravel.MH {
		s.Flags = 0
	}
	if v, ok := o.Get("flags"); ok {
		schedulerFlags(v, s)
	}
	if v, ok := o.Get("forwardingMethod"); ok {
		s.Forwarding = forwardingMethod(v)
	}
	for _, key := range []string{"uThreshold", "lThreshold"} {
		if v, ok := o.Get(key); ok {
			if limit, ok := v.Int(-1<<31, 1<<31-1); ok && limit != 0 {
				v.Warn("connection thresholds are refused, because each director counts only its own connections: " +
					"the service is served without them")
			}
		}
	}
	for _, key := range []string{"persistence", "persistenceTimeout"} {
		if v, ok := o.Get(key); ok {
			v.Warn("persistence is refused, because each director would remember only its own clients: " +
				"the service is served without it")
		}
	}
}

// schedulerFlags reads flags as `ipvsadm -b` takes them. Empty flags are the scheduler's default.
func schedulerFlags(v doc.Value, s *desired.Service) {
	text, ok := v.Text()
	if !ok || strings.TrimSpace(text) == "" {
		return
	}
	own := s.Scheduler == ravel.MH || s.Scheduler == "sh"
	var flags ravel.SchedulerFlags
	for name := range strings.SplitSeq(strings.ToLower(text), ",") {
		name = strings.TrimSpace(name)
		generic := strings.TrimPrefix(name, string(s.Scheduler)+"-")
		switch {
		case name == "flag-1", own && name != generic && generic == "fallback":
			flags |= ravel.Fallback
		case name == "flag-2", own && name != generic && generic == "port":
			flags |= ravel.HashPort
		case name == "flag-3":
			if own {
				v.Warn("flag-3 is left out: no scheduler reads it")
			}
		case slices.Contains([]string{"mh-fallback", "mh-port", "sh-fallback", "sh-port"}, name):
			v.Fault("flag %q is not for scheduler %s", name, s.Scheduler)
		default:
			v.Fault("flag %q: want flag-1, flag-2, flag-3, mh-fallback, mh-port, sh-fallback or sh-port", name)
		}
	}
	if !own {
		v.Warn("has no effect: scheduler %s reads no flags", s.Scheduler)
		flags = 0
	}
	s.Flags = flags
}

// forwardingMethod reads a service's own choice, in the original's letters or our words.
func forwardingMethod(v doc.Value) *ravel.Forwarding {
	text, ok := v.Text()
	if !ok {
		return nil
	}
	var f ravel.Forwarding
	switch strings.ToLower(strings.TrimSpace(text)) {
	case "":
		return nil
	case "g", "direct":
		f = ravel.Direct
	case "i", "tunnel":
		f = ravel.Tunnel
	case "auto":
		f = ravel.Auto
	default:
		v.Fault("forwarding method %q: want g or direct, i or tunnel, or auto", text)
	}
	return &f
}
