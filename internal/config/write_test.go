package config

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel/internal/desired"
)

// write prints a value with one element a line, so that a difference is easy to see.
func write(s Static) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("labels %v", s.Cluster.Labels)
	for _, v := range s.Cluster.Services {
		own := "the fleet's"
		if v.Forwarding != nil {
			own = v.Forwarding.String()
		}
		limits := ""
		if v.UpperThreshold != 0 || v.LowerThreshold != 0 {
			limits = fmt.Sprintf(" thresholds %d %d", v.UpperThreshold, v.LowerThreshold)
		}
		line("service %s %s: %s flags %#x onePacket %v forwarding %s%s, from %s", v.Key, v.Name(), v.Scheduler,
			uint32(v.Flags), v.OnePacket, own, limits, v.Where)
	}
	for _, v := range s.Cluster.Pool {
		line("pool VIP %s, from %s", v.VIP, v.Where)
	}
	if d := s.Cluster.Default; d != nil {
		line("default service %s/%s:%s on port %d", d.Namespace, d.Service, d.PortName, d.Port)
	}
	for _, vip := range slices.SortedFunc(maps.Keys(s.Cluster.MTU), netip.Addr.Compare) {
		line("MTU of %s: %d", vip, s.Cluster.MTU[vip])
	}
	for _, v := range s.Cluster.Nodes {
		line("node {Name:%s Addrs:%v Labels:%v Ready:%v}", v.Name, v.Addrs, v.Labels, v.Ready)
	}
	for _, v := range s.Cluster.Endpoints {
		line("endpoint %+v", v)
	}
	line("asn %d forwarding %s masquerade %v", s.Fleet.ASN, s.Fleet.Forwarding, s.Fleet.Masquerade)
	line("policy %s", policyOf(s.Fleet.Policy))
	for _, v := range s.Fleet.Directors {
		line("director %+v", v)
	}
	for _, v := range s.Fleet.Peers {
		line("peer %+v", v)
	}
	for _, v := range s.Fleet.Pools {
		line("pool %s %v %s", v.Name, v.Prefixes, policyOf(v.Policy))
	}
	for _, p := range s.Warnings {
		line("warning %s", p)
	}
	for _, p := range s.Unknown {
		line("unknown %s", p)
	}
	return b.String()
}

func policyOf(p desired.Policy) string {
	b, err := json.Marshal(p)
	if err != nil {
		panic(err)
	}
	return string(b)
}
