package desired

import (
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
)

// DefaultService is what VIPs of the pool get on one port where the documents have nothing there. It is served by TCP,
// forwarded as the fleet's services are.
type DefaultService struct {
	Namespace string
	Service   string
	PortName  string // may be empty
	Port      uint16 // of the VIPs, 1 to 65535
}

// PoolVIP is a VIP that belongs to the cluster, whether a service has it or not.
type PoolVIP struct {
	VIP   netip.Addr
	Where string // the place in the document: cluster.vipPool[0]
}

// WithDefault returns the cluster with a service of d on each VIP of its pool where no service has d's port, by either
// protocol. It is the cluster itself where d is nil or there is nothing to add, and where the cluster has a default
// service already: what a document says counts before what a process was told. c is not changed.
func (c Cluster) WithDefault(d *DefaultService) Cluster {
	if d == nil || c.Default != nil {
		return c
	}
	claimed := map[netip.Addr]bool{}
	for _, s := range c.Services {
		if s.Key.Port == d.Port {
			claimed[s.Key.VIP] = true
		}
	}
	c.Default = d
	services := slices.Clip(c.Services)
	for _, v := range c.Pool {
		if claimed[v.VIP] {
			continue
		}
		claimed[v.VIP] = true
		services = append(services, Service{
			Key:       ravel.ServiceKey{VIP: v.VIP, Proto: ravel.TCP, Port: d.Port},
			Namespace: d.Namespace, Service: d.Service, PortName: d.PortName,
			Scheduler: ravel.MH, Flags: ravel.Fallback | ravel.HashPort, Where: v.Where,
		})
	}
	c.Services = services
	return c
}
