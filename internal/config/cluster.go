package config

import (
	"math"
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
	o, ok := v.LenientObject("vipPool", "defaultService", "mtuConfig", "mtuConfig6", "labels", "ipv6", "config", "config6")
	if !ok {
		return
	}
	if v, ok := o.Get("ipv6"); ok {
		v.Entries() // it served statistics of the original only
	}
	if v, ok := o.Get("labels"); ok {
		p.labels(v)
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
	p.pool(o)
	p.mtus(o, "mtuConfig", false)
	p.mtus(o, "mtuConfig6", true)
}

// labels are those that a real server's node must have. As the original reads them, null is the empty text.
func (p *parser) labels(v doc.Value) {
	entries, _ := v.Entries()
	for _, e := range entries {
		if p.out.Cluster.Labels == nil {
			p.out.Cluster.Labels = make(map[string]string, len(entries))
		}
		text := ""
		if !e.IsWrittenNull() {
			text, _ = e.Text()
		}
		if e.Key() == "" {
			e.KeyFault("an empty key")
		}
		p.out.Cluster.Labels[e.Key()] = text
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
		if v.IsNull() && !v.IsWrittenNull() {
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
	tcp, isTCP := enabled(o, "tcpEnabled")
	udp, isUDP := enabled(o, "udpEnabled")
	if !tcp && !udp && isTCP && isUDP {
		o.Warn("neither tcpEnabled nor udpEnabled: nothing is served here")
		return // whatever else it says
	}
	s := desired.Service{
		Namespace: kubeName(o, "namespace", needed, folded),
		Service:   kubeName(o, "service", needed, folded),
		PortName:  kubeName(o, "portName", optional, folded),
		Scheduler: ravel.MH, Flags: ravel.Fallback | ravel.HashPort,
		Where: v.Path(),
	}
	boolean(o, "ipv4Enabled", false)
	boolean(o, "ipv6Enabled", false)
	if v, ok := o.Get("proxyProtocolEnabled"); ok {
		if on, _ := v.Bool(); on {
			v.Warn("has no effect, and there is nothing to add: packets reach the pods with the client's own address, " +
				"unless fleet.masquerade is true")
		}
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

// enabled reads true or false, and whether it could.
func enabled(o *doc.Object, key string) (on, ok bool) {
	v, there := o.Get(key)
	if !there {
		return false, true
	}
	return v.Bool()
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
			v.Warn("scheduler %q: want one of %s; mh is taken, where the original took wrr", name, join(ravel.Schedulers()))
		default:
			if s.Scheduler = ravel.Scheduler(name); s.Scheduler != ravel.MH {
				v.Warn("flows are not kept: by %s each director picks for itself, by mh all pick alike", name)
			}
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
	thresholds(o, s)
	for _, key := range []string{"persistence", "persistenceTimeout"} {
		if v, ok := o.Get(key); ok {
			v.Warn("persistence is refused, because each director would remember only its own clients: " +
				"the service is served without it")
		}
	}
}

// thresholds reads limits of a service's flows. As in the original, what is below 0 is 0, and a lower one that is not less
// than the upper one makes both 0.
func thresholds(o *doc.Object, s *desired.Service) {
	limit := func(key string) (int, doc.Value, bool) {
		v, there := o.Get(key)
		if !there {
			return 0, v, false
		}
		n, _ := v.Int(math.MinInt64, math.MaxInt64)
		return int(min(max(n, 0), math.MaxInt32)), v, n > 0
	}
	upper, v, has := limit("uThreshold")
	lower, below, hasLower := limit("lThreshold")
	switch {
	case !has && !hasLower:
	case lower >= upper:
		if !has {
			v = below
		}
		v.Warn("lThreshold %d is not less than uThreshold %d: there is no limit, as in the original", lower, upper)
	case s.Scheduler == ravel.MH:
		v.Warn("connection thresholds are refused with mh, because each director counts only its own connections and would " +
			"pick another real server than the others do: the service is served without them")
	default:
		v.Warn("each director counts only its own flows, and shares the thresholds out among the real servers of the service; " +
			"the original did among all nodes")
		s.UpperThreshold, s.LowerThreshold = upper, lower
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
		v.Warn("forwarding method %q: want g or direct, i or tunnel, or auto; the fleet's is taken, where the original took g", text)
		return nil
	}
	return &f
}
